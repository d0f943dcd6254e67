// The page: files and the microphone in, a card for each recording out.

import { LiveSession, about, apiKey } from "./api.js";
import { LIVE_RATE, Recorder } from "./recorder.js";
import { Result } from "./result.js";
import { draw } from "./waveform.js";

const LEVELS = 120;
const find = (id) => document.getElementById(id);

let waiting = Promise.resolve();
let hasLive = false;

/** Transcribe files one after the other. */
function add(files) {
  const list = find("results");
  list.hidden = false;
  for (const file of files) {
    const result = new Result(file, fields(), { list, onRefused: askForKey });
    waiting = waiting.then(() => result.run());
  }
}

function fields() {
  const chosen = {
    language: find("language").value.trim().toLowerCase(),
    n_best: find("n-best").value,
    timestamps: "word",
    logprobs: "true",
  };
  return Object.fromEntries(Object.entries(chosen).filter(([, value]) => value));
}

function askForKey() {
  find("access").open = true;
  find("api-key").focus();
}

function watchFiles() {
  const input = find("files");
  input.onchange = () => {
    add(input.files);
    input.value = ""; // the same file may be chosen again
  };
  const drop = find("drop");
  // Anywhere else on the page, a dropped file would replace the page.
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    drop.classList.remove("over");
    add(event.dataTransfer.files);
  });
  drop.addEventListener("dragenter", () => drop.classList.add("over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
}

function watchMicrophone() {
  const button = find("record");
  let recording = null;
  if (!navigator.mediaDevices?.getUserMedia) {
    button.disabled = true;
    find("record-status").textContent = "The microphone needs https, or a server on this machine";
    return;
  }
  let isBusy = false;
  button.onclick = async () => {
    if (isBusy) return; // not disabled: it would lose the focus
    isBusy = true;
    try {
      if (recording) {
        const file = await recording.stop();
        recording = null;
        add([file]);
      } else {
        recording = await startRecording();
      }
    } catch (error) {
      recording = null;
      showRecordError(error);
    } finally {
      isBusy = false;
      button.textContent = recording ? "Stop" : "Record";
      button.classList.toggle("recording", Boolean(recording));
    }
  };
}

async function startRecording() {
  find("record-error").hidden = true;
  const recorder = new Recorder();
  const levels = new Array(LEVELS).fill(0);
  const canvas = find("level");
  const live = find("live");
  let session = null;
  let samples = 0;
  const end = () => {
    session?.close();
    canvas.hidden = live.hidden = true;
    find("record-status").textContent = find("record-time").textContent = "";
  };
  try {
    await recorder.start((block) => {
      session?.send(block);
      samples += block.length;
      levels.shift();
      levels.push(block.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0) / 32768);
      draw(canvas, levels, 1);
      find("record-time").textContent = `${Math.floor(samples / recorder.rate)} s`;
    });
  } catch (error) {
    recorder.cancel();
    end();
    throw error;
  }
  canvas.hidden = false;
  find("record-status").textContent = "Recording";
  live.textContent = "";
  if (hasLive && recorder.rate === LIVE_RATE) {
    session = new LiveSession((text) => {
      live.hidden = false;
      live.dir = "auto";
      live.textContent = text;
    });
  }
  return {
    async stop() {
      end();
      return recorder.stop();
    },
  };
}

function showRecordError(error) {
  const reasons = {
    NotAllowedError: "The browser does not let this page use the microphone.",
    NotFoundError: "There is no microphone.",
    NotReadableError: "The microphone is in use elsewhere.",
  };
  find("record-error").textContent = reasons[error.name] ?? "The microphone cannot be used.";
  find("record-error").hidden = false;
}

async function showServer() {
  try {
    const { model, version, endpoints } = await about();
    find("model").textContent = `${model} · speechllm ${version}`;
    hasLive = "WS /v1/realtime" in endpoints;
  } catch {
    find("model").textContent = "The server cannot be reached";
  }
}

find("api-key").value = apiKey.get();
find("api-key").oninput = ({ target }) => apiKey.set(target.value.trim());
watchFiles();
watchMicrophone();
showServer();
