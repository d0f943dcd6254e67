// How sure the model was of each word, from the log-probabilities of its tokens.

/**
 * The probabilities of a text's words, in order: each the geometric mean of its tokens' by character.
 * Null where the tokens do not spell the text.
 */
export function wordConfidences(text, tokens) {
  const decoder = new TextDecoder();
  const characters = [];
  for (const { bytes, logprob } of tokens) {
    // A character of several tokens is told with the last of them.
    for (const character of decoder.decode(new Uint8Array(bytes), { stream: true })) {
      if (character.trim()) characters.push({ character, logprob });
    }
  }
  let at = 0;
  const confidences = [];
  for (const word of words(text)) {
    const letters = [...word];
    const told = characters.slice(at, (at += letters.length));
    if (told.map(({ character }) => character).join("") !== word) return null;
    confidences.push(Math.exp(told.reduce((sum, { logprob }) => sum + logprob, 0) / letters.length));
  }
  return confidences;
}

/** A text's words: what stands between white space. */
export function words(text) {
  return text.split(/\s+/u).filter(Boolean);
}
