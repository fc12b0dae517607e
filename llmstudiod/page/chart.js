// Small charts in SVG: a course over time, and bars.

import { h, put, s } from "./ui.js";

const WIDTH = 600, HEIGHT = 120, PAD = 6;

function points(values, most) {
  return values.map((value, number) => value === null || value === undefined ? null
    : [(number / Math.max(1, values.length - 1)) * WIDTH, HEIGHT - PAD - (value / most) * (HEIGHT - 2 * PAD)]);
}

/** Return a figure of a course over the last hour; a gap is where nothing is known. ``from``: since 1970. */
export function course(title, values, write, { from, step_s: step }) {
  const known = values.filter((value) => value !== null && value !== undefined);
  const most = Math.max(...known, 1e-9);
  const runs = [];
  let run = [];
  for (const point of points(values, most)) {
    if (point) run.push(point);
    else if (run.length) { runs.push(run); run = []; }
  }
  if (run.length) runs.push(run);
  const text = known.length ? `${title}: now ${write(values.at(-1) ?? known.at(-1))}, most ${write(Math.max(...known))}` : title;
  const head = h("figcaption", {}, h("span", {}, title), h("span", {}, known.length ? `last ${write(known.at(-1))} · most ${write(Math.max(...known))}` : "nothing yet"));
  if (!known.length) return h("figure", { class: "bare" }, head);
  return h("figure", {}, head,
    s("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": text },
      s("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - PAD, y2: HEIGHT - PAD }),
      runs.map((each) => {
        const line = each.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
        if (each.length === 1) return s("polyline", { class: "course", points: `${each[0][0] - 8},${each[0][1]} ${each[0][0]},${each[0][1]}` });
        return [
          s("polygon", { class: "area", points: `${each[0][0]},${HEIGHT - PAD} ${line} ${each.at(-1)[0]},${HEIGHT - PAD}` }),
          s("polyline", { class: "course", points: line }),
        ];
      })),
    h("div", { class: "scale" }, h("span", {}, hour(from)), h("span", {}, hour(from + (step * values.length) / 2)), h("span", {}, "now")));
}

function hour(at) { return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }); }

/** Return a figure of bars with their names. */
export function bars(title, items, write) {
  const most = Math.max(...items.map((item) => item.value), 1e-9);
  const step = WIDTH / Math.max(1, items.length);
  return h("figure", {},
    h("figcaption", {}, h("span", {}, title), h("span", {}, `most ${write(Math.max(0, ...items.map((item) => item.value)))}`)),
    s("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${items.filter((item) => item.value).map((item) => `${item.name} ${write(item.value)}`).join(", ") || "nothing yet"}` },
      s("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - PAD, y2: HEIGHT - PAD }),
      items.map((item, number) => {
        const height = (item.value / most) * (HEIGHT - 2 * PAD);
        return s("rect", { class: "bar", x: number * step + step * 0.12, width: step * 0.76, y: HEIGHT - PAD - height, height },
          s("title", {}, `${item.name}: ${write(item.value)}`));
      })),
    h("div", { class: "scale" }, h("span", {}, items[0]?.name ?? ""), h("span", {}, items[Math.floor(items.length / 2)]?.name ?? ""), h("span", {}, items.at(-1)?.name ?? "")));
}

/** Replace what a place shows. */
export function draw(place, ...figures) { put(place, ...figures); }
