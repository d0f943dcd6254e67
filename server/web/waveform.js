// Waveforms on a canvas.

const RATE = 8000; // enough to draw, and an hour stays small in memory
const MAX_BYTES = 200e6; // a browser holds the whole decoded file

/** The loudest sample of each of `count` stretches of a file; null where it cannot be decoded. */
export async function peaksOf(file, count) {
  if (file.size > MAX_BYTES) return null;
  try {
    const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
    const samples = buffer.getChannelData(0);
    return Array.from({ length: count }, (_, i) => {
      const from = Math.floor((i * samples.length) / count);
      const to = Math.max(from + 1, Math.floor(((i + 1) * samples.length) / count));
      let peak = 0;
      for (let at = from; at < to; at++) peak = Math.max(peak, Math.abs(samples[at] ?? 0));
      return peak;
    });
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
