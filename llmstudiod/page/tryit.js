// Talk to a model. Nothing of it is stored anywhere.

import store, { ApiError, listen } from "./data.js";
import { drawProse } from "./prose.js";
import { tabList } from "./tabs.js";
import { button, copyButton, count, h, milliseconds, put, rate, say } from "./ui.js";

const LABELS = { chat: "Message", completion: "Text to go on with", embedding: "Text to embed" };
const ENDS = { length: "ended: as many tokens as were allowed", tool_calls: "ended: it calls a tool, and there is none here", content_filter: "ended by a filter" };
const NEAR_END = 80;
const MOST_PROSE = 200_000;  // letters; a longer answer is shown as it was written
const kept = new Map();  // what was said, by mode, for as long as this tab is open

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

/** Yield the events of a stream; comments tell what is waited for. A stream that ends without its end is an error. */
async function* events(response, onComment) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { detail: "the connection was cut in the middle of the answer" });
    }
    if (part.done) throw new ApiError(0, { detail: "the answer ended in the middle" });
    held += part.value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": ")) onComment(line.slice(2));
      if (line.trim() === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield parsed(line.slice(6));
    }
  }
}

function parsed(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new ApiError(0, { detail: "the answer holds what is no JSON", hint: text.slice(0, 200) });
  }
  if (data.error) throw new ApiError(502, data);
  return data;
}

/** What one side has said, as it grows. */
class Bubble {
  constructor(kind, text = "") {
    this.thought = h("div", {});
    this.thinking = h("details", { class: "thought", hidden: true }, h("summary", {}, "Thoughts"), this.thought);
    this.body = h("div", { class: "words" }, text);
    this.trouble = h("div", {});
    this.foot = h("footer", { class: "timings" });
    this.tools = h("span", { class: "tools" });
    this.element = h("div", { class: `said ${kind}` }, h("span", { class: "hidden" }, kind === "user" ? "You:" : "Model:"), this.thinking, this.body, this.trouble, h("div", { class: "under" }, this.foot, this.tools));
  }

  draw(answer, thought, isProse) {
    if (isProse && answer.length < MOST_PROSE) drawProse(this.body, answer);
    else say(this.body, answer);
    say(this.thought, thought);
    this.thinking.hidden = !thought;
  }

  fail(error, again) {
    say(this.foot, "");
    put(this.trouble, h("div", { class: "why" }, h("p", {}, error.message), error.hint && h("p", { class: "quiet" }, error.hint),
      error.lines?.length > 0 && h("pre", {}, error.lines.join("\n")), again && h("p", {}, again)));
  }
}

export function show(main, { query }) {
  let mode = "chat";
  let running = null;
  const model = h("select", { id: "try-model" });
  const system = h("input", { id: "try-system", placeholder: "You are a helpful assistant." });
  const most = h("input", { id: "try-most", type: "number", min: 1, max: 100000, value: "512" });
  const heat = h("input", { id: "try-heat", type: "number", min: 0, max: 2, step: 0.1, placeholder: "default" });
  const place = h("div", { class: "talk", "aria-live": "off" });
  const told = h("p", { class: "hidden", role: "status" });
  const prompt = h("textarea", { id: "try-prompt", rows: 3, dir: "auto", placeholder: "Ask something …", onkeydown: (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    else if (event.key === "Escape") running?.abort();
  } });
  const sending = h("button", { class: "main" }, "Send");
  const stopping = button("Stop", () => running?.abort(), { hidden: true, title: "Escape does so too" });
  const fresh = button("Start anew", () => { begin([]); prompt.focus(); });
  const label = h("label", { for: "try-prompt" }, LABELS.chat);
  const field = (control, title) => h("div", { class: "field" }, h("label", { for: control.id }, title), control);
  const systemField = field(system, "System prompt");
  const panel = h("div", {}, h("div", { class: "fields" }, field(model, "Model"), systemField, field(most, "Tokens at most"), field(heat, "Temperature")));
  const tabs = tabList([["chat", "Chat", panel], ["completion", "Completion", panel], ["embedding", "Embedding", panel]], setMode);
  put(main,
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Try it"), h("p", { class: "quiet" }, "Nothing that is said here is stored.")), fresh),
    h("div", { class: "sheet" }, tabs.element, panel),
    place, told,
    h("form", { class: "sheet composer", onsubmit: (event) => { event.preventDefault(); send(); } }, label, prompt, h("div", { class: "row" }, sending, stopping)));

  let talk = { messages: [], bubbles: [] };

  /** Begin another conversation; what still comes belongs to the last one, and is given up. */
  function begin(bubbles, messages = []) {
    running?.abort();
    talk = { messages, bubbles };
    kept.set(mode, talk);
    put(place, bubbles.map((each) => each.element));
  }

  function setMode(next) {
    running?.abort();
    mode = next;
    tabs.select(mode);
    systemField.hidden = mode !== "chat";
    say(label, LABELS[mode]);
    const before = kept.get(mode) ?? { bubbles: [], messages: [] };
    begin(before.bubbles, before.messages);
  }

  function add(bubble) {
    talk.bubbles.push(bubble);
    place.append(bubble.element);
    bubble.element.scrollIntoView({ block: "nearest" });
    return bubble;
  }

  /** Stay at the end, where somebody is who reads along. */
  function keepAtEnd(change) {
    const isAtEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - NEAR_END;
    change();
    if (isAtEnd) window.scrollTo(0, document.documentElement.scrollHeight);
  }

  async function send(again = null) {
    const text = again ?? prompt.value.trim();
    if (!text || running || !model.value) return;
    const mine = running = new AbortController();
    sending.hidden = true;
    stopping.hidden = false;
    prompt.value = "";
    add(new Bubble("user", text));
    const shown = add(new Bubble("assistant"));
    const began = performance.now();
    try {
      if (mode === "embedding") await embed(text, shown, began);
      else await generate(text, shown, began);
    } catch (error) {
      if (error.name === "AbortError") say(shown.foot, `stopped after ${milliseconds(performance.now() - began)}`);
      else if (error instanceof ApiError) shown.fail(error, button("Try again", (event) => { event.currentTarget.remove(); send(text); }));
      else { shown.fail({ message: "The answer could not be read" }); throw error; }
    } finally {
      if (running === mine) {
        running = null;
        sending.hidden = false;
        stopping.hidden = true;
        if (place.isConnected) prompt.focus({ preventScroll: true });
      }
    }
  }

  async function generate(text, shown, began) {
    const isChat = mode === "chat", mine = talk;
    const said = { role: "user", content: text };
    const messages = [...(system.value.trim() ? [{ role: "system", content: system.value.trim() }] : []), ...mine.messages, said];
    const body = { model: model.value, stream: true, stream_options: { include_usage: true }, max_tokens: Number(most.value) || 512, ...(isChat ? { messages } : { prompt: text }) };
    if (heat.value !== "") body.temperature = Number(heat.value);
    say(shown.foot, "asking …");
    const response = await ask(isChat ? "/v1/chat/completions" : "/v1/completions", body, running.signal);
    let answer = "", thought = "", firstAt = null, last = {}, frame = 0, why = null;
    const draw = () => { frame = 0; keepAtEnd(() => shown.draw(answer, thought, isChat)); };
    try {
      for await (const piece of events(response, (comment) => say(shown.foot, `${comment} …`))) {
        const choice = piece.choices?.[0];
        const added = (isChat ? choice?.delta?.content : choice?.text) ?? "";
        thought += choice?.delta?.reasoning_content ?? "";
        answer += added;
        why = choice?.finish_reason ?? why;
        if ((added || thought) && firstAt === null) { firstAt = performance.now(); say(shown.foot, "writing …"); shown.thinking.open = !added; }
        if (answer && shown.thinking.open && added === answer) shown.thinking.open = false;
        if (piece.timings || piece.usage) last = { ...last, ...piece };
        frame ||= requestAnimationFrame(draw);
      }
    } finally {
      cancelAnimationFrame(frame);
      draw();
      if (isChat && (answer || thought)) mine.messages.push(said, { role: "assistant", content: answer });
      if (answer) put(shown.tools, copyButton(answer));
    }
    const timings = last.timings;
    keepAtEnd(() => say(shown.foot, [
      firstAt !== null ? `first token after ${milliseconds(firstAt - began)}` : "it wrote nothing",
      timings && `${count(timings.prompt_n)} tokens read at ${rate(timings.prompt_per_second)}/s`,
      timings && `${count(timings.predicted_n)} written at ${rate(timings.predicted_per_second)}/s`,
      `${milliseconds(performance.now() - began)} in all`,
      ENDS[why],
    ].filter(Boolean).join(" · ")));
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
    sending.disabled = names.length === 0;
    const now = names.map((item) => `${item.id} ${item.state}`).join("\n");
    if (now === known) return;
    known = now;
    const chosen = model.value || query.get("model");
    put(model, names.map((item) => h("option", { value: item.id }, item.state === "ready" ? item.name : `${item.name} (${item.state})`)));
    if (chosen && store.instances.has(chosen)) model.value = chosen;
  }
  const end = listen((names) => { if (names.has("instances")) drawModels(); });
  drawModels();
  setMode("chat");
  prompt.focus();
  return () => { end(); running?.abort(); };
}
