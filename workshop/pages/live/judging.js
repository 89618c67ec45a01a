// Three pairs without labels, to be judged.

import { create } from "./dom.js";
import { scoreRows } from "./evidence.js";

const VERDICTS = { "shared lineage": "They share weights", "no evidence of shared lineage": "No evidence that they do", "cannot tell": "Cannot tell" };

export function showPairs(place, pairs, strangers) {
  place.replaceChildren(...pairs.map((pair, number) => card(pair, number, strangers)));
}

function card({ scores, verdict, truth }, number, strangers) {
  const name = `Pair ${number + 1}`;
  const answer = create("p", { class: "answer", role: "status" });
  const judge = (guess) => {
    answer.textContent = `${guess === verdict ? "So says the package too" : `The package says: ${VERDICTS[verdict].toLowerCase()}`}. ${truth}`;
  };
  const choices = Object.entries(VERDICTS).map(([value, words]) =>
    create("label", {}, create("input", { type: "radio", name: `pair-${number}`, value, onchange: () => judge(value) }), ` ${words}`),
  );
  return create("fieldset", { class: "card" }, create("legend", {}, name), ...scoreRows(scores, strangers), create("div", { class: "choices" }, ...choices), answer);
}
