// Calls to this server, with the keys of this tab.
const store = (name) => ({
  get: () => sessionStorage.getItem(name) || "",
  set: (value) => (value ? sessionStorage.setItem(name, value) : sessionStorage.removeItem(name)),
});

export const keys = { api: store("ellm-api-key"), admin: store("ellm-admin-key") };

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key, more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not from this server
  }
  throw new Refused(response.status, message);
}

export async function get(path, key) {
  const response = await checked(await fetch(path, { headers: headers(key), cache: "no-store" }));
  return response.json();
}

// One chat completion: yields {text}, {reason}, and at the end {usage}. The first value is {id}.
export async function* chat(body, signal) {
  const response = await checked(
    await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(keys.api.get(), { "content-type": "application/json" }),
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    }),
  );
  yield { id: response.headers.get("x-request-id") };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream ended early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) yield { usage: chunk.usage };
      const choice = chunk.choices[0];
      const text = choice?.delta.content || choice?.delta.reasoning_content;
      if (text) yield { text };
      if (choice?.finish_reason) yield { reason: choice.finish_reason };
    }
  }
}
