// Scores beside what strangers reach, and pictures of what the methods look at.

import { create, draw, fixed } from "./dom.js";
import { deviation, mean, normsOf, readStdProfile } from "./methods.js";

export const METHODS = {
  std_profile: "how the spread of attention weights changes from layer to layer",
  norm_profile: "whether norm weights agree, dimension by dimension",
  csu: "whether neurons that resemble each other stand at the same place",
  virtual_response_whitened: "what every layer answers to single tokens",
};

export function describeScore(method, score) {
  if (score === undefined) return "…";
  if (score === null) return "refused";
  if (method !== "csu") return fixed(score);
  if (score <= 1e-300) return "p ≤ 10⁻³⁰⁰";
  return score >= 0.01 ? `p = ${fixed(score)}` : `p = 10${superscript(Math.round(Math.log10(score)))}`;
}

function superscript(number) {
  return String(number).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
}

// A row for each method: a bar, the score, and a tick that strangers do not pass by themselves.
export function scoreRows(scores, strangers) {
  return Object.entries(METHODS).map(([method, words]) => scoreRow(method, words, scores[method], strangers[method]));
}

function scoreRow(method, words, score, stranger) {
  const share = (value) => Math.max(0, method === "csu" ? Math.log10(value) / -300 : value);
  const [filled, tick] = [score ? share(score) : 0, share(stranger)];
  const isAbove = filled > tick;
  return create("div", { class: "score", "data-method": method },
    create("div", { class: "method" }, create("code", {}, method), create("span", { class: "quiet" }, words)),
    create("div", { class: "track" },
      create("span", { class: isAbove ? "filled above" : "filled", style: { width: `${100 * filled}%` } }),
      create("span", { class: "tick", style: { left: `${100 * tick}%` } })),
    create("output", { class: "number" }, describeScore(method, score)));
}

const zscores = (curve) => curve.map((value) => (value - mean(curve)) / deviation(curve));

// Four panels of the standard deviation over the layers, A as a line and B dashed.
export function showProfiles(place, a, b, r) {
  const [ours, theirs] = [readStdProfile(a), readStdProfile(b)];
  const panels = Object.keys(ours).map((role, number) => {
    const [x, y] = [(layer) => 100 * number + 14 + 24 * layer, (value) => 62 - 22 * value];
    const line = (curve, name) => draw("polyline", { class: name, points: zscores(curve).map((value, layer) => `${x(layer)},${y(value)}`).join(" ") });
    const dots = (curve, name) => zscores(curve).map((value, layer) => draw("circle", { class: name, cx: x(layer), cy: y(value), r: 3.5 }));
    return draw("g", {},
      draw("text", { x: 100 * number + 50, y: 10, "text-anchor": "middle" }, role.toUpperCase()),
      line(ours[role], "of-a"), ...dots(ours[role], "of-a"), line(theirs[role], "of-b"), ...dots(theirs[role], "of-b"));
  });
  const words = `Spread of Q, K, V and O over the ${a.layers.length} layers in A and in B; the curves correlate with ${fixed(r)}.`;
  place.replaceChildren(draw("svg", { viewBox: "0 0 400 124", role: "img", "aria-label": words }, ...panels));
}

// A dot for each dimension: its weight in the last norm of A, and in that of B.
export function showNorms(place, a, b, r) {
  const [ours, theirs] = [a, b].map((model) => normsOf(model).at(-1));
  const scale = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return (value) => (high > low ? (value - low) / (high - low) : 0.5);
  };
  const [x, y] = [scale(ours), scale(theirs)];
  const dots = Array.from(ours, (value, i) => draw("circle", { class: "dot", cx: 12 + 126 * x(value), cy: 138 - 126 * y(theirs[i]), r: 2.5 }));
  const words = r === null ? "The norm weights of B are all the same." : `Weights of the last norm, A across and B upwards. All norms together correlate with ${fixed(r)}.`;
  place.replaceChildren(square(words, dots));
}

// A dot for each neuron of the first layer of A: its place there, and the place of the one in B that it was matched with.
export function showOrder(place, places, p) {
  const step = 126 / places.length;
  const dots = places.map((other, own) => draw("circle", { class: "dot", cx: 12 + step * own, cy: 138 - step * other, r: 1.8 }));
  place.replaceChildren(square(`Places of matched neurons, in A across and in B upwards: ${describeScore("csu", p)} for the order.`, dots));
}

// A bar for each of the three tables of each layer: how far the answers of A and B agree.
export function showAnswers(place, correlations) {
  const [width, gap] = [126 / correlations.length, 3];
  const bars = correlations.map((r, number) => draw("rect", { class: "dot", x: 12 + width * number + (number % 3 ? 0 : gap), y: 132 - 118 * Math.max(r, 0), width: width - gap, height: 118 * Math.max(r, 0) }));
  const line = draw("line", { x1: 12, x2: 138, y1: 132, y2: 132, stroke: "currentColor" });
  const names = ["A", "OV", "M"];
  const words = correlations.map((r, number) => `layer ${Math.floor(number / 3)} ${names[number % 3]} ${fixed(r)}`).join(", ");
  place.replaceChildren(square(`Correlation of the whitened answers, three tables a layer: ${words}.`, [...bars, line]));
}

function square(words, dots) {
  const frame = draw("rect", { x: 6, y: 6, width: 138, height: 138, rx: 4, class: "frame" });
  return draw("svg", { viewBox: "0 0 150 150", role: "img", "aria-label": words }, frame, ...dots);
}
