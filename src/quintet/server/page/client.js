// The server: which models it has, and answers as they are made.

const KEY = "quintet.key";

/** What went wrong, in words for who reads, and whether it may go better later. */
class Failure extends Error {
  constructor(message, { status = 0, again = true } = {}) {
    super(message);
    this.status = status;
    this.again = again;
  }
}

let apiKey = attempt(() => sessionStorage.getItem(KEY)) ?? "";

function setApiKey(key) {
  apiKey = key;
  attempt(() => sessionStorage.setItem(KEY, key));
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    // No redirect: it would take the key along.
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const { status } = response;
  const said = await response.json().then((body) => body?.error?.message, () => null);
  const detail = typeof said === "string" && said ? said : `The server answered with status ${status}.`;
  if (status === 401) return new Failure("The server wants a valid API key.", { status });
  if (status === 429 || status === 503) {
    const seconds = Number(response.headers.get("Retry-After"));
    const wait = seconds > 0 ? counted(Math.ceil(seconds), "second") : "a moment";
    return new Failure(`${detail.replace(/[.]$/, "")}. Try again in ${wait}.`, { status });
  }
  return new Failure(detail, { status, again: status >= 500 || status === 408 });
}

/** Ask for an answer, and give its pieces; the last one has the usage. */
async function* chat(body, signal) {
  const asked = { method: "POST", body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", asked);
  // What of the request has no effect there.
  yield { heard: true, warnings: response.headers.get("warnings") };
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message ?? "The server failed.");
    const choice = chunk.choices?.[0];
    yield {
      content: choice?.delta?.content ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      ended: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new Failure("The connection ended before the answer did.");
}

/** The data of each event of a stream of server-sent events. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection broke in the middle of the answer.");
    }
    if (piece.done) return;
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const each of lines) {
      const line = each.endsWith("\r") ? each.slice(0, -1) : each;
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      else if (!line && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
