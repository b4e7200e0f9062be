// The playground: a chat that streams, with what its answers cost.
import { chat, get, keys, Refused } from "./api.js";
import { $, duration, make } from "./dom.js";
import { showTimeline } from "./timeline.js";

const messages = [];
let running = null; // AbortController of the answer that comes
let chatNumber = 0;

function turn(role, text = "") {
  $("log").querySelector(".empty")?.remove();
  const paragraph = make("p", { text });
  const element = make("div", { className: `turn ${role}` }, paragraph);
  $("log").append(element);
  element.scrollIntoView({ block: "end" });
  return { element, paragraph };
}

function near(element) {
  return element.scrollHeight - element.scrollTop - element.clientHeight < 80;
}

function meta(element, begun, firstAt, usage, reason, id) {
  const parts = [];
  if (firstAt !== null) parts.push(`first token ${duration((firstAt - begun) / 1000)}`);
  if (usage && usage.completion_tokens > 1 && firstAt !== null) {
    const perToken = (performance.now() - firstAt) / 1000 / (usage.completion_tokens - 1);
    parts.push(`${usage.completion_tokens} tokens`, `${(1 / perToken).toFixed(0)} tokens/s`);
  }
  if (usage?.prompt_tokens_details?.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} of the prompt cached`);
  if (reason === "length") parts.push("cut at the token limit");
  const line = make("div", { className: "meta" }, ...parts.map((text) => make("span", { text })));
  if (id) {
    const button = make("button", { type: "button", className: "link", text: "timeline" });
    button.addEventListener("click", () => showTimeline(id));
    line.append(button);
  }
  element.append(line);
}

async function answer(openKeys) {
  const { element, paragraph } = turn("assistant");
  element.classList.add("busy");
  const begun = performance.now();
  const mine = chatNumber;
  let [firstAt, usage, reason, id] = [null, null, null, null];
  running = new AbortController();
  busy(true);
  try {
    const body = {
      model: $("model").value,
      messages,
      temperature: Number($("temperature").value),
      max_tokens: Math.max(1, Number($("max-tokens").value) || 256),
    };
    for await (const part of chat(body, running.signal)) {
      id = part.id ?? id;
      usage = part.usage ?? usage;
      reason = part.reason ?? reason;
      if (part.text) {
        firstAt ??= performance.now();
        const follow = near($("log"));
        paragraph.append(part.text);
        if (follow) $("log").scrollTop = $("log").scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") element.append(make("p", { className: "error", text: error.message }));
    if (error instanceof Refused && error.status === 401) openKeys();
  } finally {
    running = null;
    busy(false);
    element.classList.remove("busy");
    meta(element, begun, firstAt, usage, reason, id);
    if (near($("log"))) $("log").scrollTop = $("log").scrollHeight;
  }
  if (mine !== chatNumber) return;  // another chat has begun
  if (paragraph.textContent) messages.push({ role: "assistant", content: paragraph.textContent });
  else messages.pop();
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").disabled = is;
}

export async function loadModels() {
  const { data } = await get("v1/models", keys.api.get());
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map(({ id }) => make("option", { value: id, text: id })));
  if (data.some(({ id }) => id === chosen)) $("model").value = chosen;
}

export function playground(openKeys) {
  $("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    if (!text || running) return;
    $("prompt").value = "";
    messages.push({ role: "user", content: text });
    turn("user", text);
    answer(openKeys);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
  $("clear").addEventListener("click", () => {
    running?.abort();
    chatNumber += 1;
    messages.length = 0;
    $("log").replaceChildren(make("p", { className: "empty", text: "Ask something. The answer streams in as the cluster computes it." }));
    $("prompt").focus();
  });
}
