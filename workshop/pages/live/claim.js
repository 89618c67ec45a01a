// Explore a claim: model B is rewritten, what it computes stays, and four methods are asked again.

import { bar, create, find, fixed, visible } from "./dom.js";
import { openModel } from "./engine.js";
import { describeScore, scoreRows, showAnswers, showNorms, showOrder, showProfiles } from "./evidence.js";
import { showPairs } from "./judging.js";
import { compareResponses, csu, mean, normProfile, readResponses, stdProfile } from "./methods.js";
import { finish, finishWithPauses, forward } from "./model.js";
import { Generator } from "./random.js";
import { FRAMES, GAUGES, rewrite } from "./rewrites.js";
import { nextProbabilities, ranked } from "./sampling.js";
import { decode, encode, readTokenizer } from "./tokenizer.js";

const TEXT = "The river was quiet that morning. def mean(values): 12 + 30 =";

let tokenizer, models, ids;
let answersOfA; // its whitened response
let amounts = {}; // of the rewrites, by name
let latest = 0;

async function update() {
  const request = ++latest;
  const isStale = () => request !== latest;
  find("claim").ariaBusy = true;
  const a = models.original;
  const start = models[find("start").value];
  const b = rewrite(start, amounts, a);
  const scores = { std_profile: stdProfile(a, b), norm_profile: normProfile(a, b) };
  showScores(scores);
  showProfiles(find("profiles"), a, b, scores.std_profile);
  showNorms(find("norms"), a, b, scores.norm_profile);

  const before = await finishWithPauses(forward(start, ids), isStale);
  const after = before && (await finishWithPauses(forward(b, ids), isStale));
  if (!after) return;
  showFunction(before.logits, after.logits);

  const order = await finishWithPauses(csu(a, b), isStale);
  if (!order) return;
  showScores({ ...scores, csu: order.p });
  showOrder(find("order"), order.places, order.p);

  const answers = await finishWithPauses(readResponses(b, RELATIVES.tokens), isStale);
  if (!answers) return;
  const agreement = compareResponses(answersOfA, answers);
  const all = { ...scores, csu: order.p, virtual_response_whitened: mean(agreement) };
  showScores(all);
  find("said").textContent = Object.entries(all).map(([method, score]) => `${method} ${describeScore(method, score)}`).join(", ");
  showAnswers(find("answers"), agreement);
  find("claim").ariaBusy = false;
}

function showScores(scores) {
  find("scores").replaceChildren(...scoreRows(scores, RELATIVES.strangers));
}

// How far any logit moved, and what B expects next.
function showFunction(before, after) {
  const moved = Math.max(...before.map((logits, t) => Math.max(...logits.map((logit, id) => Math.abs(logit - after[t][id])))));
  const now = nextProbabilities(after.at(-1));
  const shown = ranked(now, 5);
  const name = (id) => `“${visible(decode(tokenizer, [id]))}”`;
  const bars = shown.map((id) => bar({ label: name(id), share: now[id] / now[shown[0]], number: `${fixed(100 * now[id], 1)} %`, colour: "#4477AA" }));
  const words = shown.map((id) => `${name(id)} ${fixed(100 * now[id], 1)} %`).join(", ");
  find("function").replaceChildren(
    create("p", {}, "Largest change of any logit: ", create("output", { id: "moved" }, moved ? moved.toExponential(1) : "0"), moved && moved < 1e-9 ? ", which is rounding." : "."),
    create("p", {}, "What B expects after “", create("code", {}, TEXT), "”:"),
    create("div", { class: "named", role: "img", "aria-label": `The likeliest next tokens: ${words}.` }, ...bars),
  );
}

function showRewrites() {
  const set = (name, value) => {
    amounts = { ...amounts, [name]: value };
    return update();
  };
  const control = ({ name, label, most }) => {
    const number = create("output", {}, most ? fixed(0) : "");
    const move = ({ target }) => {
      if (most) number.textContent = fixed(target.valueAsNumber);
      set(name, most ? target.valueAsNumber : target.checked);
    };
    const range = { min: 0, max: most, step: most / 20, value: 0 };
    const input = create("input", { id: name, title: name, ...(most ? { type: "range", ...range, oninput: move } : { type: "checkbox", onchange: move }) });
    return create("div", { class: most ? "slider" : "row ticked" }, create("label", { for: name }, label), ...(most ? [number, input] : [input]));
  };
  find("gauges").replaceChildren(...GAUGES.map(control));
  find("frames").replaceChildren(...FRAMES.map(control));
}

function reset() {
  amounts = {};
  showRewrites();
  return update();
}

async function open() {
  tokenizer = readTokenizer(RELATIVES.tokenizer);
  models = { original: await openModel(RELATIVES.original, Float64Array), stranger: await openModel(RELATIVES.stranger, Float64Array) };
  ids = encode(tokenizer, TEXT);
  answersOfA = await finishWithPauses(readResponses(models.original, RELATIVES.tokens), () => false);
  showRewrites();
  showPairs(find("pairs"), RELATIVES.pairs, RELATIVES.strangers);
  find("start").addEventListener("change", update);
  find("as-it-was").addEventListener("click", reset);
  await update();
  // For whoever opens the console: minimoe.rewrite(minimoe.models.stranger, { scale_qk: 1 }, minimoe.models.original).
  const functions = { rewrite, stdProfile, normProfile, csu, readResponses, compareResponses, forward, finish, Generator };
  globalThis.minimoe = { tokenizer, models, ...functions };
}

open();
