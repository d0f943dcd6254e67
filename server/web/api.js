// The server's API. Addresses are relative, so that the page works behind a prefix.

const KEY = "speechllm-api-key";

let key = stored(() => sessionStorage.getItem(KEY)) ?? "";

export const apiKey = {
  get: () => key,
  set: (value) => {
    key = value;
    stored(() => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)));
  },
};

/** Some browsers are set to keep nothing for a page, and say so by an error. */
function stored(access) {
  try {
    return access();
  } catch {
    return null;
  }
}

/** What the server says of a failure; `message` is for people. */
export class ApiError extends Error {
  constructor(message, { code = null, requestId = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { code, requestId, status });
  }
}

/** The server's name, version, model and endpoints. */
export async function about() {
  return (await fetch("./", { headers: { Accept: "application/json" } })).json();
}

/**
 * Transcribe a file. `fields` are the form's; `onText` is told the text so far.
 * Returns the whole answer. Raises ApiError, or AbortError through `signal`.
 */
export async function transcribe(file, fields, { onText, signal }) {
  // What is wrong here must not look as if it were the server.
  if (!/^[\x21-\x7e]*$/.test(apiKey.get())) throw new ApiError("The API key has characters that no key can have.", { status: 401 });
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new ApiError("The file cannot be read: it was moved or changed.");
  }
  const form = new FormData();
  form.append("file", file, file.name);
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  // Several answers come of a beam search, which knows its text at its end only.
  const streams = !(fields.n_best > 1);
  form.append("stream", String(streams));
  const headers = apiKey.get() ? { Authorization: `Bearer ${apiKey.get()}` } : {};
  const response = await answered(() => fetch("transcribe", { method: "POST", body: form, headers, signal }));
  if (!response.ok) throw await refusal(response);
  if (!streams) return answered(() => response.json());
  let text = "";
  for await (const event of events(response)) {
    if (event.error) throw apiError(event.error, response.status);
    if (event.type === "transcript.text.delta") onText((text += event.delta));
    if (event.type === "transcript.text.done") return event;
  }
  throw new ApiError("The answer broke off before its end.");
}

async function answered(ask) {
  try {
    return await ask();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function refusal(response) {
  try {
    return apiError((await response.json()).error, response.status);
  } catch {
    return new ApiError(`The server answered ${response.status}.`, { status: response.status });
  }
}

function apiError({ message, code, request_id: requestId }, status) {
  return new ApiError(message, { code, requestId, status });
}

/** The JSON of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await answered(() => reader.read());
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6) : "[DONE]";
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/**
 * A live session for 16 kHz samples. `onText` is told the text so far; nobody is told of failures,
 * since the recording is transcribed once more when it is complete.
 */
export class LiveSession {
  #socket;
  #turns = new Map();
  #isReady = false;

  constructor(onText) {
    const address = new URL("v1/realtime", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    const protocols = ["realtime"];
    // A browser cannot set headers on a WebSocket; a key may be part of a protocol's name.
    if (apiKey.get()) protocols.push(`openai-insecure-api-key.${apiKey.get()}`);
    try {
      this.#socket = new WebSocket(address, protocols);
    } catch {
      return; // a key with characters that no protocol's name may have
    }
    this.#socket.onopen = () => this.#configure();
    this.#socket.onmessage = ({ data }) => this.#take(JSON.parse(data), onText);
  }

  #configure() {
    const input = { format: { type: "audio/pcm", rate: 16000 } };
    const session = { type: "transcription", audio: { input } };
    this.#socket.send(JSON.stringify({ type: "session.update", session }));
  }

  #take(event, onText) {
    if (event.type === "session.updated") this.#isReady = true;
    if (!event.type.startsWith("conversation.item.input_audio_transcription.")) return;
    const before = this.#turns.get(event.item_id) ?? "";
    this.#turns.set(event.item_id, event.transcript ?? before + (event.delta ?? ""));
    onText([...this.#turns.values()].map((turn) => turn.trim()).filter(Boolean).join(" "));
  }

  /** Send samples, an Int16Array; those from before the session is there are left out. */
  send(samples) {
    if (this.#isReady && this.#socket.readyState === WebSocket.OPEN) this.#socket.send(samples);
  }

  close() {
    // One that is closed before it is open makes the browser complain.
    if (this.#socket?.readyState === WebSocket.CONNECTING) {
      this.#socket.onopen = () => this.#socket.close();
    } else {
      this.#socket?.close();
    }
  }
}
