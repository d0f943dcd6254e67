// The microphone, as blocks of samples while it records and as a WAV file at the end.

export const LIVE_RATE = 16000;

export class Recorder {
  #stream;
  #context;
  #gatherer;
  #isComplete;
  #blocks = [];

  get rate() {
    return this.#context.sampleRate;
  }

  /** Start; `onBlock` is given each Int16Array. Raises what getUserMedia raises. */
  async start(onBlock) {
    this.#stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    const source = await this.#connect();
    await this.#context.audioWorklet.addModule("web/pcm-worklet.js");
    const gatherer = new AudioWorkletNode(this.#context, "gatherer", { channelCount: 1, channelCountMode: "explicit" });
    this.#gatherer = gatherer;
    gatherer.port.onmessage = ({ data }) => {
      if (!data) return this.#isComplete();
      const block = Int16Array.from(data, (sample) => 32767 * Math.max(-1, Math.min(1, sample)));
      this.#blocks.push(block);
      onBlock(block);
    };
    source.connect(gatherer).connect(this.#context.destination); // its output is silence
  }

  async #connect() {
    this.#context = new AudioContext({ sampleRate: LIVE_RATE });
    try {
      return this.#context.createMediaStreamSource(this.#stream);
    } catch {
      // Some browsers do not resample a microphone: record at its own rate, without live text.
      await this.#context.close();
      this.#context = new AudioContext();
      return this.#context.createMediaStreamSource(this.#stream);
    }
  }

  /** End, and return the recording as a file. */
  async stop() {
    const { rate } = this;
    const complete = new Promise((resolve) => (this.#isComplete = resolve));
    this.#gatherer.port.postMessage("end");
    // A context that the browser has suspended would never answer.
    await Promise.race([complete, new Promise((resolve) => setTimeout(resolve, 500))]);
    this.cancel();
    return new File([wavHeader(this.#blocks, rate), ...this.#blocks], recordingName(), { type: "audio/wav" });
  }

  /** Let go of the microphone. */
  cancel() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#context?.close();
  }
}

function wavHeader(blocks, rate) {
  const bytes = blocks.reduce((sum, block) => sum + block.byteLength, 0);
  const view = new DataView(new ArrayBuffer(44));
  const write = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // mono
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, bytes, true);
  return view;
}

function recordingName() {
  return `Recording ${new Date().toTimeString().slice(0, 8).replaceAll(":", "-")}.wav`;
}
