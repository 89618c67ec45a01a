// A mixture from the scripts of the page, ready to be run.

import { buildModel } from "./model.js";
import { decode, encode } from "./tokenizer.js";
import { readTensors } from "./weights.js";

export async function openModel(packed, FloatArray) {
  return buildModel(packed.config, await readTensors(packed, FloatArray));
}

// The ids of what somebody typed or pasted, or the reason why they are not run.
export function read(tokenizer, text, context) {
  const wanted = `wanted 1 to ${context} tokens`;
  const bytes = new TextEncoder().encode(text).length;
  if (bytes > context * tokenizer.longest) return { refusal: `The text has ${text.length.toLocaleString("en")} characters: ${wanted}.` };
  const ids = encode(tokenizer, text);
  if (ids.length > context) return { refusal: `The text has ${ids.length} tokens: ${wanted}.` };
  return ids.length ? { ids, pieces: ids.map((id) => decode(tokenizer, [id])) } : { refusal: `The text is empty: ${wanted}.` };
}
