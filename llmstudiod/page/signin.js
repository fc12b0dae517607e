// Signing in: with the address that `llmstudioctl web` prints, or with a key that has the admin right.

import { post } from "./data.js";
import { h, put, say } from "./ui.js";

export function show(main, { reason, done }) {
  const told = h("p", { class: "error-text", role: "alert" }, reason);
  const field = h("input", { id: "secret", type: "password", autocomplete: "current-password", required: true, spellcheck: "false" });
  const send = h("button", { class: "main" }, "Sign in");
  const form = h("form", {
    class: "sign-in",
    onsubmit: async (event) => {
      event.preventDefault();
      send.disabled = true;
      say(told, "");
      const secret = field.value.trim();
      try {
        await post("/sign-in", secret.startsWith("llms-") ? { key: secret } : { code: secret });
        await done();
      } catch (error) {
        say(told, error.hint ? `${error.message}: ${error.hint}` : error.message);
        send.disabled = false;
        field.select();
      }
    },
  },
  h("h1", {}, "Sign in"),
  h("p", {}, "Run ", h("code", {}, "llmstudioctl web"), " on the machine and open the address that it prints."),
  h("p", { class: "quiet" }, "Or give its code, or an API key with the admin right (", h("code", {}, "llmstudioctl key add NAME --admin"), ")."),
  h("label", { for: "secret" }, "Code or admin key"), field, told, send);
  put(main, form);
  document.title = "Sign in – llmstudiod";
  field.focus();
}
