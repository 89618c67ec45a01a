// Explore an MoE: the front page.

import { openModel, read } from "./engine.js";
import { finish, forward } from "./model.js";
import { nextProbabilities } from "./sampling.js";
import { decode, encode, readTokenizer } from "./tokenizer.js";

async function start() {
  const tokenizer = readTokenizer(MIXTURE.tokenizer);
  const [balanced, unbalanced] = await Promise.all([openModel(MIXTURE.balanced), openModel(MIXTURE.unbalanced)]);
  globalThis.minimoe = { tokenizer, balanced, unbalanced, read, encode, decode, forward, finish, nextProbabilities };
}

globalThis.minimoeReady = start();
