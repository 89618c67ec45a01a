// Text into tokens and back: byte-level BPE. A text becomes pieces, a piece bytes, and neighbouring bytes grow into tokens.

// Digits stand alone, before anything else is looked at.
const DIGIT = /(\p{N})/u;
// A word with the space before it, what is neither letter nor space, or space; the English endings by themselves.
const PIECE =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

// Every byte has a letter, so that tokens are strings: printable ones are themselves, the others come after U+0100.
const LETTERS = lettersOfBytes();
const BYTES = new Map(LETTERS.map((letter, byte) => [letter, byte]));

function lettersOfBytes() {
  const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : others++));
}

// `tokens` by id, and `merges`, pairs of tokens in the order in which training joined them.
export function readTokenizer({ tokens, merges }) {
  return {
    tokens,
    ids: new Map(tokens.map((token, id) => [token, id])),
    ranks: new Map(merges.map((pair, rank) => [pair.join(" "), rank])),
    longest: Math.max(...tokens.map((token) => token.length)), // bytes
  };
}

// The ids of a text.
export function encode(tokenizer, text) {
  const pieces = text.toWellFormed().split(DIGIT).flatMap((part) => part.match(PIECE) ?? []);
  return pieces.flatMap((piece) => merge(tokenizer, lettersOf(piece)).map((token) => tokenizer.ids.get(token)));
}

function lettersOf(piece) {
  return Array.from(new TextEncoder().encode(piece), (byte) => LETTERS[byte]);
}

// Joins, again and again, the neighbours that training joined first.
function merge(tokenizer, parts) {
  const rank = (place) => tokenizer.ranks.get(`${parts[place]} ${parts[place + 1]}`) ?? Infinity;
  const ranks = parts.map((_, place) => rank(place)); // of each part with the next one
  for (;;) {
    let best = 0;
    for (let place = 1; place < ranks.length; place++) if (ranks[place] < ranks[best]) best = place;
    if (!(ranks[best] < Infinity)) return parts;
    parts.splice(best, 2, parts[best] + parts[best + 1]);
    ranks.splice(best, 1);
    ranks[best] = rank(best);
    if (best > 0) ranks[best - 1] = rank(best - 1);
  }
}

// The text of some ids. A part of a character becomes a replacement character.
export function decode(tokenizer, ids) {
  const letters = ids.flatMap((id) => [...tokenizer.tokens[id]]);
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(letters, (letter) => BYTES.get(letter)));
}
