// What the model expects after a token, beside what it expects as it was trained.

import { bar, create, percent, visible } from "./dom.js";
import { nextProbabilities, ranked } from "./sampling.js";
import { decode } from "./tokenizer.js";

const SHOWN = 8;

// `before` are the logits as trained; where they are others, ticks show what they gave.
export function showPrediction(place, tokenizer, piece, logits, before, temperature) {
  const now = nextProbabilities(logits, temperature);
  const then = nextProbabilities(before, temperature);
  const isChanged = now.some((probability, id) => Math.abs(probability - then[id]) > 1e-12);
  const shown = ranked(now, SHOWN);
  const most = Math.max(now[shown[0]], ...(isChanged ? shown.map((id) => then[id]) : []));
  const name = (id) => `“${visible(decode(tokenizer, [id]))}”`;
  const bars = shown.map((id) =>
    bar({ label: name(id), share: now[id] / most, number: percent(now[id]), colour: "#4477AA", mark: isChanged ? then[id] / most : null }),
  );
  const words = shown.map((id) => `${name(id)} ${percent(now[id])}${isChanged ? `, as trained ${percent(then[id])}` : ""}`).join("; ");
  place.replaceChildren(
    create("p", {}, "After ", create("b", {}, `“${visible(piece)}”`), isChanged ? sayChange(name, now, then) : ", as the model was trained."),
    create("div", { class: "named", role: "img", "aria-label": `The likeliest next tokens: ${words}.` }, ...bars),
  );
  return isChanged;
}

function sayChange(name, now, then) {
  const [[first], [former]] = [ranked(now, 1), ranked(then, 1)];
  const moved = now.reduce((sum, probability, id) => sum + Math.abs(probability - then[id]) / 2, 0);
  const words = first === former ? `${name(first)} stays the likeliest` : `${name(first)} is now the likeliest, as trained it is ${name(former)}`;
  return `: ${words}. ${percent(moved)} of the probability has moved; ticks show where it was.`;
}
