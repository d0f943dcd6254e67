// Runs in the audio thread: gathers the microphone's samples into blocks of 100 ms or so.

const BLOCK = 2048;

class Gatherer extends AudioWorkletProcessor {
  #block = new Float32Array(BLOCK);
  #filled = 0;

  constructor() {
    super();
    // At the end: the rest, and a mark behind it.
    this.port.onmessage = () => {
      this.port.postMessage(this.#block.subarray(0, this.#filled));
      this.#filled = 0;
      this.port.postMessage(null);
    };
  }

  process([[channel]]) {
    if (!channel) return true;
    for (const sample of channel) {
      this.#block[this.#filled++] = sample;
      if (this.#filled === BLOCK) {
        this.port.postMessage(this.#block);
        this.#block = new Float32Array(BLOCK);
        this.#filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("gatherer", Gatherer);
