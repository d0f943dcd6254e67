// Waveforms on a canvas.

const RATE = 8000; // enough to draw
// A browser decodes a whole file at its own rate before it resamples it: some 25 MB a minute.
const MAX_BYTES = 50e6;
const MAX_SECONDS = 600;

let decoding = Promise.resolve();

/**
 * The loudest sample of each of `count` stretches of a file, and how many seconds it lasts; null
 * where it cannot be decoded, or is too long for that. One file is decoded at a time.
 */
export function peaksOf(file, count, seconds) {
  if (file.size > MAX_BYTES || (Number.isFinite(seconds) && seconds > MAX_SECONDS)) return null;
  const found = decoding.then(() => decoded(file, count));
  decoding = found;
  return found;
}

async function decoded(file, count) {
  try {
    const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
    const samples = buffer.getChannelData(0);
    const peaks = Array.from({ length: count }, (_, i) => {
      const from = Math.floor((i * samples.length) / count);
      const to = Math.max(from + 1, Math.floor(((i + 1) * samples.length) / count));
      let peak = 0;
      for (let at = from; at < to; at++) peak = Math.max(peak, Math.abs(samples[at] ?? 0));
      return peak;
    });
    return { peaks, seconds: buffer.duration };
  } catch {
    return null;
  }
}

/** Draw peaks from 0 to 1; those before `played`, from 0 to 1, in the accent colour. */
export function draw(canvas, peaks, played = 0) {
  const { clientWidth, clientHeight } = canvas;
  canvas.width = clientWidth * devicePixelRatio;
  canvas.height = clientHeight * devicePixelRatio;
  const context = canvas.getContext("2d");
  const colour = (name) => getComputedStyle(canvas).getPropertyValue(name);
  const step = canvas.width / peaks.length;
  const loudest = Math.max(0.05, ...peaks);
  peaks.forEach((peak, i) => {
    const height = Math.max(devicePixelRatio, (peak / loudest) * canvas.height * 0.95);
    context.fillStyle = colour(i < played * peaks.length ? "--accent" : "--wave");
    context.fillRect(i * step, (canvas.height - height) / 2, Math.max(1, step * 0.7), height);
  });
}
