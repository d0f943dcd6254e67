// One recording's card: its progress, its transcript, its audio.

import { ApiError, transcribe } from "./api.js";
import { wordConfidences, words } from "./confidence.js";
import { FORMATS } from "./formats.js";
import { draw, peaksOf } from "./waveform.js";

const PEAKS = 200;
const WAITING = "Waiting";
const UNSURE = 0.8;
const DOUBTFUL = 0.5;
const NOTES = {
  length: "The text was cut at its longest.",
  loop: "The model repeated itself, and its text was cut.",
};
const STAGES = [
  ["decode", "Reading the audio"],
  ["queue", "Waiting for its turn"],
  ["encode", "Listening (encoder)"],
  ["generate", "Writing (language model)"],
];

export class Result {
  #file;
  #fields;
  #onRefused;
  #abort = new AbortController();
  #answer;
  #peaks;
  #find;

  /** Show a file's card at the top of `list`; `onRefused` is told of an API key that is missing or wrong. */
  constructor(file, fields, { list, onRefused }) {
    this.#file = file;
    this.#fields = fields;
    this.#onRefused = onRefused;
    const card = document.getElementById("result").content.cloneNode(true).firstElementChild;
    this.#find = (selector) => card.querySelector(selector);
    this.#find("h3").textContent = file.name;
    this.#find(".status").textContent = WAITING;
    this.#find(".actions").onclick = ({ target }) => this.#act(target.dataset);
    this.#find(".cancel").onclick = () => {
      this.#abort.abort();
      if (this.#find(".status").textContent === WAITING) this.#cancelled();
    };
    this.#find(".again").onclick = () => {
      this.#abort = new AbortController();
      this.run();
    };
    list.querySelector("h2").after(card);
    this.#play();
  }

  /** Transcribe, and show what comes of it. */
  async run() {
    if (this.#abort.signal.aborted) return; // while it waited
    const started = performance.now();
    let firstText = null;
    const transcript = this.#find(".transcript");
    this.#begin(transcript);
    try {
      this.#answer = await transcribe(this.#file, this.#fields, {
        signal: this.#abort.signal,
        onText: (text) => {
          firstText ??= performance.now() - started;
          this.#find(".status").textContent = "Transcribing …";
          transcript.textContent = text;
        },
      });
      const took = performance.now() - started;
      this.#show(transcript, this.#answer);
      this.#showLatency(this.#answer.timings, { firstText, took });
      const length = this.#answer.duration.toFixed(1);
      this.#find(".status").textContent = `${length} s of audio in ${(took / 1000).toFixed(2)} s`;
    } catch (error) {
      this.#fail(error, transcript);
    }
    transcript.setAttribute("aria-busy", "false");
    this.#find(".cancel").hidden = true;
  }

  #begin(transcript) {
    transcript.setAttribute("aria-busy", "true");
    transcript.replaceChildren();
    this.#find(".status").textContent = "Sending …";
    this.#find(".cancel").hidden = false;
    this.#find(".again").hidden = true;
    this.#find(".error").hidden = true;
  }

  #cancelled() {
    this.#find(".status").textContent = "Cancelled";
    this.#find(".again").hidden = false;
    this.#find(".cancel").hidden = true;
  }

  #fail(error, transcript) {
    transcript.replaceChildren();
    if (error.name === "AbortError") {
      this.#cancelled();
      return;
    }
    this.#find(".again").hidden = false;
    if (!(error instanceof ApiError)) console.error(error);
    this.#find(".status").textContent = "Failed";
    const box = this.#find(".error");
    box.hidden = false;
    box.textContent = error instanceof ApiError ? sentence(error.message) : "This page failed to show the answer.";
    const names = [error.code, error.requestId && `request ${error.requestId}`].filter(Boolean).join(" · ");
    if (names) box.append(element("small", {}, names));
    if (error.status === 401) this.#onRefused();
  }

  #show(transcript, answer) {
    this.#find(".actions").hidden = false;
    transcript.lang = answer.language ?? "";
    transcript.dir = "auto";
    if (!answer.segments.length) {
      transcript.replaceChildren(element("p", {}, "No speech was found."));
      return;
    }
    const confidences = wordConfidences(answer.segments.map(({ text }) => text).join(" "), answer.logprobs ?? []);
    const told = confidences?.values();
    transcript.replaceChildren(...answer.segments.map((segment) => this.#segment(segment, told)));
    this.#find(".legend").hidden = !confidences?.some((confidence) => confidence < UNSURE);
  }

  #segment(segment, confidences) {
    const row = element("div", { className: "segment" });
    const time = clock(segment.start);
    const button = element("button", { type: "button", className: "time" }, time);
    button.setAttribute("aria-label", `Play from ${time}`);
    button.onclick = () => this.#seek(segment.start);
    const text = element("p", {});
    const spoken = words(segment.text);
    // The placed words are the text's own, unless the checkpoint could not place them all.
    const places = segment.words?.length === spoken.length ? segment.words : [];
    spoken.forEach((word, i) => text.append(i ? " " : "", this.#word(word, places[i], confidences?.next().value)));
    row.append(button, text);
    if (NOTES[segment.finish_reason]) row.append(element("p", { className: "note" }, NOTES[segment.finish_reason]));
    if (segment.hypotheses?.length > 1) row.append(alternatives(segment.hypotheses));
    row.dataset.from = segment.start;
    row.dataset.to = segment.end;
    return row;
  }

  #word(word, place, confidence) {
    const span = element("span", {}, word);
    if (confidence < UNSURE) {
      span.className = confidence < DOUBTFUL ? "doubtful" : "unsure";
      span.title = `${Math.round(100 * confidence)} % sure`;
    }
    if (place) {
      span.dataset.start = place.start;
      span.onclick = () => this.#seek(place.start);
    }
    return span;
  }

  #showLatency({ total, ...stages }, { firstText, took }) {
    const rows = STAGES.map(([name, label]) => [label, 1000 * stages[name]]);
    rows.push(["Server, in all", 1000 * total], ["First text, seen here", firstText ?? took], ["Answer, seen here", took]);
    const longest = Math.max(...rows.map(([, milliseconds]) => milliseconds));
    this.#find("tbody").replaceChildren(...rows.map(([label, milliseconds]) => {
      const head = element("th", { scope: "row" }, label);
      const bar = element("div", {});
      bar.style.width = `${(100 * milliseconds) / longest}%`;
      const row = element("tr", {});
      row.append(head, element("td", {}, `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`), element("td", { className: "bar" }));
      row.lastChild.append(bar);
      return row;
    }));
    this.#find(".latency").hidden = false;
  }

  async #play() {
    const audio = this.#find("audio");
    const canvas = this.#find("canvas");
    audio.src = URL.createObjectURL(this.#file);
    audio.setAttribute("aria-label", `Audio of ${this.#file.name}`);
    canvas.setAttribute("aria-label", `Waveform of ${this.#file.name}`);
    const known = new Promise((resolve) => {
      audio.onerror = resolve;
      audio.onloadedmetadata = () => {
        this.#find(".player").hidden = false;
        resolve();
      };
    });
    await known;
    const found = await peaksOf(this.#file, PEAKS, audio.duration);
    this.#peaks = found?.peaks;
    canvas.hidden = !this.#peaks;
    // A recording made in a browser may not know its own length.
    const length = () => (Number.isFinite(audio.duration) ? audio.duration : found.seconds);
    const redraw = () => this.#peaks && draw(canvas, this.#peaks, audio.currentTime / length() || 0);
    new ResizeObserver(redraw).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    audio.ontimeupdate = audio.onseeked = () => {
      redraw();
      this.#mark(audio.currentTime);
    };
    canvas.onclick = ({ offsetX }) => this.#seek((offsetX / canvas.clientWidth) * length());
  }

  #seek(seconds) {
    const audio = this.#find("audio");
    audio.currentTime = seconds;
    audio.play().catch(() => {}); // a browser may want a click on the player itself
  }

  #mark(seconds) {
    for (const row of this.#find(".transcript").querySelectorAll(".segment")) {
      const isCurrent = row.dataset.from <= seconds && seconds < row.dataset.to;
      row.setAttribute("aria-current", String(isCurrent));
    }
  }

  #act({ action, format }) {
    if (action === "copy") this.#copy();
    if (format) this.#download(format);
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.#answer.text);
      this.#find(".status").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.#find(".transcript"));
      this.#find(".status").textContent = "Selected: copy it with the keyboard";
    }
  }

  #download(format) {
    const { type, write } = FORMATS[format];
    const { type: _, ...answer } = this.#answer;
    const address = URL.createObjectURL(new Blob([write(answer)], { type }));
    const name = this.#file.name.replace(/\.[^.]*$/, "");
    element("a", { href: address, download: `${name}.${format}` }).click();
    URL.revokeObjectURL(address);
  }
}

function alternatives(hypotheses) {
  const details = element("details", {});
  const list = element("ol", {});
  for (const { text, score } of hypotheses) {
    list.append(element("li", {}, `${text || "(nothing)"} — ${Math.round(100 * Math.exp(score))} %`));
  }
  details.append(element("summary", {}, `${hypotheses.length} alternatives, and how sure of their tokens`), list);
  return details;
}

function element(name, properties, text = "") {
  const made = Object.assign(document.createElement(name), properties);
  if (text) made.textContent = text;
  return made;
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")}`;
}
