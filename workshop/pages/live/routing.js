// What a router decides for one token, from its logits: minimoe/model/routing.py in JavaScript.

export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

// Scores all experts and keeps the k best. Their weights are their scores, divided so that they add up to 1.
//
// `temperature` flattens the scores above 1 and sharpens them below; `bias`, a number an expert, is added for the choice only.
export function routeTopk(logits, k, { temperature = 1, bias = null } = {}) {
  const scores = softmax(logits.map((logit) => logit / temperature));
  const choice = bias ? scores.map((score, expert) => score + bias[expert]) : scores;
  const order = Array.from(choice.keys()).sort((a, b) => choice[b] - choice[a] || a - b);
  const indices = order.slice(0, k);
  const sum = indices.reduce((total, expert) => total + scores[expert], 0);
  return { logits, scores, indices, weights: indices.map((expert) => scores[expert] / sum) };
}

// The choice with an expert switched off: its slot is empty, the weights of the others stay as they are.
export function without(chosen, expert) {
  return { ...chosen, weights: chosen.weights.map((weight, slot) => (chosen.indices[slot] === expert ? 0 : weight)) };
}

// The share of the tokens whose first choice each expert is.
export function loadOf(choices, experts) {
  const counts = new Array(experts).fill(0);
  for (const { indices } of choices) counts[indices[0]] += 1 / choices.length;
  return counts;
}
