// One token in one layer, down to the arithmetic; and its path through all layers.

import { bar, chip, COLOURS, create, draw, fixed, percent, visible } from "./dom.js";

let dimension = 0; // whose sum is written out

// What the router scored, who was chosen, and what they wrote.
export function showToken(place, piece, layer, route, router, { temperature, bias }) {
  const { logits, scores, indices } = route;
  const best = Math.max(...scores);
  const bars = scores.map((score, expert) =>
    bar({
      label: chip(expert),
      share: score / best,
      number: `${fixed(logits[expert])} → ${percent(score)}${bias?.[expert] ? ` ${signed(bias[expert])}` : ""}`,
      colour: COLOURS[expert % COLOURS.length],
      chosen: indices.includes(expert),
    }),
  );
  const scored = scores.map((score, expert) => `expert ${expert} ${percent(score)}`).join(", ");
  place.replaceChildren(
    create("p", { class: "which" }, create("b", {}, `“${visible(piece)}”`), ` in layer ${layer}`),
    create("div", { class: "pair" },
      create("div", {},
        create("h3", {}, "1  The router scores all experts"),
        create("div", { role: "img", "aria-label": `Scores of “${visible(piece)}” in layer ${layer}: ${scored}. Chosen: ${indices.join(", ")}.` },
          create("div", { class: "bar title" }, create("span"), create("span"), create("span", {}, "logit → score")), ...bars),
        create("details", {}, create("summary", {}, "Where a score comes from"), ...scoreLines(route, router, temperature)),
      ),
      create("div", {},
        create("h3", {}, `2  The best ${indices.length === 1 ? "one computes" : `${indices.length} compute`}, and are added by weight`),
        ...outputStrips(route),
      ),
    ),
  );
}

const signed = (number) => (number < 0 ? fixed(number) : `+${fixed(number)}`);

// The score of the first choice in four lines.
function scoreLines({ input, logits, scores, indices }, router, temperature) {
  const [first] = indices;
  const row = router.data.subarray(first * router.columns, (first + 1) * router.columns);
  const products = [0, 1, 2].map((i) => `${fixed(input[i])} × ${fixed(row[i])}`).join(" + ");
  const sum = indices.reduce((total, expert) => total + scores[expert], 0);
  const tempered = temperature === 1 ? "logit" : `logit / ${fixed(temperature, 1)}`;
  return [
    `The token's ${input.length} numbers times row ${first} of the router: ${products} + … = ${fixed(logits[first])}, its logit.`,
    `Softmax: e^(${tempered}), divided by the sum over all ${scores.length} experts: ${fixed(scores[first], 3)}.`,
    `Weight among the chosen: ${fixed(scores[first], 3)} / ${fixed(sum, 3)} = ${fixed(scores[first] / sum, 3)}.`,
  ].map((line) => create("p", { class: "sum" }, line));
}

// The outputs of the chosen experts as strips of colour, their weighted sum, and one dimension of it in numbers.
function outputStrips({ indices, weights, outputs, output }) {
  const largest = Math.max(...output.map(Math.abs), ...outputs.flatMap((vector) => Array.from(vector, Math.abs)), 1e-9);
  const rows = indices.map((expert, slot) => stripRow([`${fixed(weights[slot])} × `, chip(expert)], outputs[slot], largest));
  const line = create("output", { class: "sum" });
  const write = () => {
    const terms = indices.map((_, slot) => `${fixed(weights[slot])} × ${inBrackets(outputs[slot][dimension])}`).join(" + ");
    line.textContent = `${terms} = ${fixed(output[dimension], 3)}`;
  };
  const slider = create("input", { type: "range", id: "dimension", min: 0, max: output.length - 1, value: dimension });
  const label = create("label", { for: "dimension" }, `Dimension ${dimension} in numbers`);
  slider.addEventListener("input", () => {
    dimension = slider.valueAsNumber;
    label.textContent = `Dimension ${dimension} in numbers`;
    write();
  });
  write();
  const words = `The outputs of ${indices.map((expert, slot) => `expert ${expert} with weight ${fixed(weights[slot])}`).join(", ")}, and their sum: ${output.length} numbers each, negative ones blue, positive ones red.`;
  return [create("div", { class: "outputs", role: "img", "aria-label": words }, ...rows, stripRow(["sum"], output, largest)), label, slider, line];
}

const inBrackets = (value) => (value < 0 ? `(${fixed(value, 3)})` : fixed(value, 3));

function stripRow(label, vector, largest) {
  const step = 100 / vector.length;
  const stops = Array.from(vector, (value, i) => {
    const strength = Math.round(100 * Math.sqrt(Math.abs(value) / largest));
    const colour = `color-mix(in srgb, ${value < 0 ? "#4477AA" : "#EE6677"} ${strength}%, var(--paper))`;
    return `${colour} ${fixed(i * step)}% ${fixed((i + 1) * step)}%`;
  });
  const strip = create("span", { class: "strip", style: { background: `linear-gradient(to right, ${stops.join(", ")})` } });
  return create("div", { class: "bar wide" }, create("span", { class: "label" }, ...label), strip);
}

// Layers from left to right, experts from top to bottom, lines as strong as the weights they join.
export function showPath(place, piece, choices, selected) {
  const experts = choices[0].scores.length;
  const [x, y] = [(layer) => 60 + 84 * layer, (expert) => 34 + 30 * expert];
  const lines = choices.slice(1).flatMap(({ indices, weights }, before) =>
    choices[before].indices.flatMap((from, a) =>
      indices.map((to, b) => {
        const strength = choices[before].weights[a] * weights[b];
        return draw("line", { x1: x(before), y1: y(from), x2: x(before + 1), y2: y(to), class: "way", "stroke-width": 1 + 9 * strength, opacity: 0.15 + 0.6 * strength });
      }),
    ),
  );
  const nodes = choices.flatMap(({ indices, weights }, layer) => Array.from({ length: experts }, (_, expert) => node(x(layer), y(expert), expert, indices, weights)));
  const names = choices.map((_, layer) => draw("text", { x: x(layer), y: 12, "text-anchor": "middle", class: layer === selected ? "here" : "" }, `layer ${layer}`));
  const words = choices.map(({ indices, weights }, layer) => `layer ${layer}: ${indices.map((expert, slot) => `expert ${expert} with weight ${fixed(weights[slot])}`).join(", ")}`);
  const size = { viewBox: `24 0 ${84 * choices.length - 8} ${34 + 30 * experts - 8}`, role: "img", "aria-label": `The path of “${visible(piece)}”. ${words.join("; ")}.` };
  place.replaceChildren(draw("svg", size, ...names, ...lines, ...nodes));
}

function node(x, y, expert, indices, weights) {
  const slot = indices.indexOf(expert);
  if (slot < 0 || !weights[slot]) return draw("circle", { cx: x, cy: y, r: 3, class: "unused" });
  const radius = 9 + 5 * weights[slot];
  const text = draw("text", { x, y: y + 4, "text-anchor": "middle", class: "inside" }, String(expert));
  return draw("g", {}, draw("circle", { cx: x, cy: y, r: radius, fill: COLOURS[expert % COLOURS.length], class: "chosen" }), text);
}
