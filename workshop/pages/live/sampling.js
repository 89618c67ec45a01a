// What comes next, from the logits of the last token: `_pick` in minimoe/model/transformer.py.

import { softmax } from "./routing.js";

// The probability of each token at a temperature; at 0 the likeliest has all of it.
export function nextProbabilities(logits, temperature = 1) {
  const largest = Math.max(...logits);
  if (temperature === 0) {
    const best = logits.indexOf(largest);
    return Array.from(logits, (_, id) => (id === best ? 1 : 0));
  }
  return softmax(Array.from(logits, (logit) => (logit - largest) / temperature));
}

// The ids in order of their probability, the likeliest first.
export function ranked(probabilities, count) {
  return Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a] || a - b).slice(0, count);
}

// A token drawn by its probability; `chance` is a number from 0 to 1.
export function pick(probabilities, chance) {
  let sum = 0;
  for (const id of ranked(probabilities)) {
    sum += probabilities[id];
    if (chance < sum) return id;
  }
  return ranked(probabilities, 1)[0]; // what rounding left over
}
