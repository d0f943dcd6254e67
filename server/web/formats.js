// An answer as a file.

import { words } from "./confidence.js";

const MAX_CUE_CHARACTERS = 84;
const MAX_CUE_SECONDS = 7;
const PAUSE_SECONDS = 0.8;

export const FORMATS = {
  txt: { type: "text/plain", write: (answer) => `${answer.text}\n` },
  srt: { type: "application/x-subrip", write: srt },
  vtt: { type: "text/vtt", write: vtt },
  json: { type: "application/json", write: (answer) => `${JSON.stringify(answer, null, 2)}\n` },
};

function srt(answer) {
  const blocks = cues(answer).map(({ start, end, text }, i) =>
    `${i + 1}\n${clock(start, ",")} --> ${clock(end, ",")}\n${text.replace(/-{2,}>/g, "->")}\n\n`);
  return blocks.join("");
}

function vtt(answer) {
  const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const blocks = cues(answer).map(({ start, end, text }) =>
    `${clock(start, ".")} --> ${clock(end, ".")}\n${escape(text)}\n`);
  return ["WEBVTT\n", ...blocks].join("\n");
}

/** Subtitles: a segment each, or shorter ones where its words are placed in time. */
function cues({ segments }) {
  return segments.flatMap((segment) => {
    const spoken = words(segment.text);
    if (segment.words?.length !== spoken.length) {
      return spoken.length ? [{ ...segment, text: spoken.join(" ") }] : [];
    }
    const found = [];
    segment.words.forEach(({ start, end }, i) => {
      const word = spoken[i];
      const last = found.at(-1);
      const fits = last && last.text.length + word.length < MAX_CUE_CHARACTERS && end - last.start <= MAX_CUE_SECONDS
        && start - last.end <= PAUSE_SECONDS;
      if (fits) Object.assign(last, { text: `${last.text} ${word}`, end });
      else found.push({ text: word, start, end });
    });
    return found;
  });
}

function clock(seconds, separator) {
  const whole = Math.round(1000 * seconds);
  const two = (number) => String(Math.floor(number)).padStart(2, "0");
  const rest = String(whole % 1000).padStart(3, "0");
  return `${two(whole / 3600000)}:${two((whole / 60000) % 60)}:${two((whole / 1000) % 60)}${separator}${rest}`;
}
