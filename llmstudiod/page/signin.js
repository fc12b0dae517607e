// Signing in: with the address that `llmstudioctl web` prints, or with a key that has the admin right.

import { post } from "./data.js";
import { h, say } from "./ui.js";

let open = null;

/** Ask no more. */
export function dismiss() {
  const gone = open;
  open = null;
  gone?.remove();
}

/** Ask for a code or a key until it is a good one. */
export function ask({ reason, done }) {
  dismiss();
  const told = h("p", { class: "error-text", role: "alert" }, reason);
  const field = h("input", { id: "secret", type: "password", autocomplete: "current-password", required: true, spellcheck: "false" });
  const send = h("button", { class: "main" }, "Sign in");
  const form = h("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      send.disabled = true;
      say(told, "");
      const secret = field.value.trim();
      try {
        await post("/sign-in", secret.startsWith("llms-") ? { key: secret } : { code: secret });
      } catch (error) {
        say(told, error.hint ? `${error.message}: ${error.hint}` : error.message);
        send.disabled = false;
        field.select();
        return;
      }
      dismiss();
      done();
    },
  },
  h("h1", {}, "Sign in"),
  h("p", {}, "Run ", h("code", {}, "llmstudioctl web"), " on the machine and open the address that it prints."),
  h("p", { class: "quiet" }, "Or give its code, or an API key with the admin right (", h("code", {}, "llmstudioctl key add NAME --admin"), ")."),
  h("label", { for: "secret" }, "Code or admin key"), field, told, send);
  // A browser lets `cancel` be prevented a few times only; what is below stays covered all the same.
  const dialog = h("dialog", {
    class: "sign-in", "aria-label": "Sign in", oncancel: (event) => event.preventDefault(),
    onclose: () => { if (open === dialog) { dialog.showModal(); field.focus(); } },
  }, form);
  open = dialog;
  document.body.append(dialog);
  dialog.showModal();
  document.title = "Sign in – llmstudiod";
  field.focus();
}
