// Tabs as the ARIA practices have them: arrow keys go from one to the next, and each has its panel.

import { freshId, h, mark } from "./ui.js";

/** Return a list of tabs; ``choices``: [value, title, panel]; ``chosen`` is told the value. */
export function tabList(choices, chosen) {
  const buttons = choices.map(([value, title, panel], number) => {
    const id = freshId("tab-");
    mark(panel, "id", panel.id || freshId("panel-"));
    mark(panel, "role", "tabpanel");
    mark(panel, "aria-labelledby", id);
    return h("button", { type: "button", role: "tab", id, "data-mode": value, "aria-selected": "false", "aria-controls": panel.id, tabindex: number ? -1 : 0, onclick: () => chosen(value) }, title);
  });
  const element = h("div", {
    class: "tabs", role: "tablist",
    onkeydown: (event) => {
      const at = buttons.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const next = buttons[(to + buttons.length) % buttons.length];
      next.focus();
      next.click();
    },
  }, buttons);
  const select = (value) => {
    for (const [number, [each, , panel]] of choices.entries()) {
      mark(buttons[number], "aria-selected", String(each === value));
      mark(buttons[number], "tabindex", each === value ? 0 : -1);
      if (each === value) mark(panel, "aria-labelledby", buttons[number].id);
    }
  };
  return { element, select };
}
