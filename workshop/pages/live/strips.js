// Tokens as tiles in the colour of their expert, and the load of the experts beside them.

import { COLOURS, create, draw, percent, visible } from "./dom.js";
import { loadOf } from "./routing.js";

// A row of the grid: the tokens of a layer. `choose(token)` is called for a tile; without it tiles are only to be looked at.
export function strip(layer, pieces, choices, { selected = null, choose = null } = {}) {
  const tiles = pieces.flatMap((piece, token) => {
    const end = piece.includes("\n") ? [create("span", { class: "break", role: "presentation" })] : [];
    return [tile(layer, token, piece, choices[token], { isSelected: token === selected, choose }), ...end];
  });
  return create("div", { class: "tiles" }, ...tiles);
}

function tile(layer, token, piece, { indices: [expert], weights: [weight], scores }, { isSelected, choose }) {
  const words = `${visible(piece)}, expert ${expert} with ${percent(scores[expert])}${weight ? "" : ", switched off"}`;
  const element = create(
    "span",
    { class: weight ? "tile" : "tile off", title: words, style: { "--colour": COLOURS[expert % COLOURS.length] } },
    create("span", { class: "piece" }, visible(piece)),
    create("span", { class: "expert" }, String(expert)),
  );
  if (choose) {
    element.setAttribute("role", "gridcell");
    element.setAttribute("aria-label", `layer ${layer}, token ${token + 1}: ${words}`);
    element.setAttribute("aria-selected", isSelected);
    element.tabIndex = isSelected ? 0 : -1;
    element.addEventListener("click", () => choose(token));
  }
  return element;
}

// How many of the tokens go to each expert first: a bar for each, and a line at an even share.
export function loadBars(choices, experts, name) {
  const load = loadOf(choices, experts);
  const [width, height, scale] = [16, 40, 40 / Math.max(0.5, ...load)];
  const even = height - scale / experts;
  const bars = load.flatMap((share, expert) => [
    draw("rect", { x: expert * width + 1, y: height - scale * share, width: width - 2, height: scale * share, fill: COLOURS[expert % COLOURS.length] }),
    draw("text", { x: (expert + 0.5) * width, y: height + 11, "text-anchor": "middle" }, String(expert)),
  ]);
  const words = load.map((share, expert) => `expert ${expert} ${percent(share)}`).join(", ");
  const line = draw("line", { x1: 0, x2: width * experts, y1: even, y2: even, class: "even" });
  const base = draw("line", { x1: 0, x2: width * experts, y1: height, y2: height, class: "base" });
  const size = { viewBox: `0 0 ${width * experts} ${height + 14}`, class: "load", role: "img", "aria-label": `${name}: ${words}` };
  return draw("svg", size, draw("title", {}, words), ...bars, base, line);
}
