// Talk to a model. Nothing of it is stored anywhere.

import store, { ApiError, listen } from "./data.js";
import { button, count, h, mark, milliseconds, note, put, rate, say } from "./ui.js";

async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { detail: "the daemon cannot be reached" });
  }
  if (!response.ok) throw new ApiError(response.status, await response.json().catch(() => null));
  return response;
}

/** Yield the events of a stream; comments tell what is waited for. */
async function* events(response, onComment) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": ")) onComment(line.slice(2));
      else if (line.startsWith("data: ") && line !== "data: [DONE]") {
        const data = JSON.parse(line.slice(6));
        if (data.error) throw new ApiError(502, data);
        yield data;
      }
    }
  }
}

export function show(main, { query }) {
  let mode = "chat";
  let running = null;
  const talk = [];
  const model = h("select", { id: "try-model" });
  const system = h("input", { id: "try-system", placeholder: "You are a helpful assistant." });
  const most = h("input", { id: "try-most", type: "number", min: 1, max: 100000, value: "512" });
  const heat = h("input", { id: "try-heat", type: "number", min: 0, max: 2, step: 0.1, placeholder: "default" });
  const place = h("div", { class: "talk", "aria-live": "off" });
  const told = h("p", { class: "hidden", role: "status" });
  const prompt = h("textarea", { id: "try-prompt", rows: 3, placeholder: "Ask something …", onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); } } });
  const sending = h("button", { class: "main" }, "Send");
  const stopping = button("Stop", () => running?.abort(), { hidden: true });
  const fresh = button("Start anew", () => { talk.length = 0; put(place); prompt.focus(); });
  const labels = { chat: "Message", completion: "Text to go on with", embedding: "Text to embed" };
  const label = h("label", { for: "try-prompt" }, labels.chat);
  const tabs = h("div", { class: "tabs", role: "tablist" }, [["chat", "Chat"], ["completion", "Completion"], ["embedding", "Embedding"]].map(([value, title]) =>
    h("button", { type: "button", role: "tab", "aria-selected": String(value === mode), "data-mode": value, onclick: () => setMode(value) }, title)));
  const field = (control, title) => h("div", { class: "field" }, h("label", { for: control.id }, title), control);
  const systemField = field(system, "System prompt");
  put(main,
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Try it"), h("p", { class: "quiet" }, "Nothing that is said here is stored.")), fresh),
    h("div", { class: "sheet" }, tabs, h("div", { class: "fields" }, field(model, "Model"), systemField, field(most, "Tokens at most"), field(heat, "Temperature"))),
    place, told,
    h("form", { class: "sheet", onsubmit: (event) => { event.preventDefault(); send(); } }, label, prompt, h("p", {}), h("div", { class: "row" }, sending, stopping)));

  function setMode(next) {
    mode = next;
    for (const tab of tabs.children) mark(tab, "aria-selected", String(tab.dataset.mode === mode));
    systemField.hidden = mode !== "chat";
    say(label, labels[mode]);
    talk.length = 0;
    put(place);
  }

  function bubble(kind, text = "") {
    const thought = h("div", { class: "thought", hidden: true });
    const body = h("div", {}, text);
    const foot = h("footer", { class: "timings" });
    const element = h("div", { class: `said ${kind}` }, h("span", { class: "hidden" }, kind === "user" ? "You:" : "Model:"), thought, body, foot);
    place.append(element);
    element.scrollIntoView({ block: "nearest" });
    return { element, thought, body, foot };
  }

  async function send() {
    const text = prompt.value.trim();
    if (!text || running) return;
    running = new AbortController();
    sending.hidden = true;
    stopping.hidden = false;
    prompt.value = "";
    bubble("user", text);
    const shown = bubble("assistant");
    const began = performance.now();
    try {
      if (mode === "embedding") await embed(text, shown, began);
      else await generate(text, shown, began);
    } catch (error) {
      if (error.name === "AbortError") say(shown.foot, `stopped after ${milliseconds(performance.now() - began)}`);
      else if (error instanceof ApiError) {
        put(shown.body, h("div", { class: "why" }, h("p", {}, error.message), error.hint && h("p", { class: "quiet" }, error.hint), error.lines.length > 0 && h("pre", {}, error.lines.join("\n"))));
      } else { note("The answer could not be read", { isError: true }); throw error; }
    } finally {
      running = null;
      sending.hidden = false;
      stopping.hidden = true;
      prompt.focus();
    }
  }

  async function generate(text, shown, began) {
    const isChat = mode === "chat";
    if (isChat) talk.push({ role: "user", content: text });
    const messages = [...(system.value.trim() ? [{ role: "system", content: system.value.trim() }] : []), ...talk];
    const body = { model: model.value, stream: true, stream_options: { include_usage: true }, max_tokens: Number(most.value) || 512, ...(isChat ? { messages } : { prompt: text }) };
    if (heat.value !== "") body.temperature = Number(heat.value);
    say(shown.foot, "asking …");
    const response = await ask(isChat ? "/v1/chat/completions" : "/v1/completions", body, running.signal);
    let answer = "", thought = "", firstAt = null, last = {}, isDue = false;
    const draw = () => { isDue = false; say(shown.body, answer); say(shown.thought, thought); shown.thought.hidden = !thought; };
    try {
      for await (const piece of events(response, (comment) => say(shown.foot, `${comment} …`))) {
        const choice = piece.choices?.[0];
        const added = (isChat ? choice?.delta?.content : choice?.text) ?? "";
        thought += choice?.delta?.reasoning_content ?? "";
        answer += added;
        if ((added || thought) && firstAt === null) { firstAt = performance.now(); say(shown.foot, ""); }
        if (piece.timings || piece.usage) last = { ...last, ...piece };
        if (!isDue) { isDue = true; requestAnimationFrame(draw); }
      }
    } finally {
      draw();
      if (isChat) talk.push({ role: "assistant", content: answer });
    }
    const timings = last.timings;
    say(shown.foot, [
      firstAt !== null && `first token after ${milliseconds(firstAt - began)}`,
      timings && `${count(timings.prompt_n)} tokens read at ${rate(timings.prompt_per_second)}/s`,
      timings && `${count(timings.predicted_n)} written at ${rate(timings.predicted_per_second)}/s`,
      `${milliseconds(performance.now() - began)} in all`,
    ].filter(Boolean).join(" · "));
    say(told, `The answer is complete: ${answer.slice(0, 300)}`);
  }

  async function embed(text, shown, began) {
    say(shown.foot, "asking …");
    const response = await ask("/v1/embeddings", { model: model.value, input: text }, running.signal);
    const { data } = await response.json();
    const vector = data[0].embedding;
    const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
    put(shown.body, h("p", {}, `${vector.length} dimensions, norm ${norm.toFixed(4)}`), h("pre", {}, `[${vector.slice(0, 16).map((value) => value.toFixed(5)).join(", ")}${vector.length > 16 ? ", …" : ""}]`));
    say(shown.foot, milliseconds(performance.now() - began));
  }

  let known = "";
  function drawModels() {
    const names = [...store.instances.values()].sort((a, b) => (b.state === "ready") - (a.state === "ready") || a.id.localeCompare(b.id));
    const now = names.map((item) => `${item.id} ${item.state}`).join("\n");
    if (now === known) return;
    known = now;
    const chosen = model.value || query.get("model");
    put(model, names.map((item) => h("option", { value: item.id }, item.state === "ready" ? item.name : `${item.name} (${item.state})`)));
    if (chosen && store.instances.has(chosen)) model.value = chosen;
  }
  const end = listen((names) => { if (names.has("instances")) drawModels(); });
  drawModels();
  prompt.focus();
  return () => { end(); running?.abort(); };
}
