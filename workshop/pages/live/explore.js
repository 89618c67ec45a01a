// Explore an MoE: the front page. A text is read whenever it or a control changes, and everything is drawn anew.

import { asTrained, routingOf, showControls, slider } from "./controls.js";
import { create, find, percent, visible } from "./dom.js";
import { openModel, read } from "./engine.js";
import { finish, finishWithPauses, forward } from "./model.js";
import { showPrediction } from "./prediction.js";
import { loadOf, routeTopk, without } from "./routing.js";
import { nextProbabilities, pick } from "./sampling.js";
import { loadBars, strip } from "./strips.js";
import { showPath, showToken } from "./token.js";
import { decode, encode, readTokenizer } from "./tokenizer.js";

const EXAMPLES = {
  Story: "The river was quiet that morning, and nobody on the bridge spoke.",
  Code: "def mean(values):\n    return sum(values) / len(values)",
  Sums: "12 + 30 = 42, 17 * 3 = 51, 905 - 6 = 899",
  French: "Le matin, la rivière était calme.",
  Emoji: "Two cats 🐈🐈 and a cup of tea 🍵",
};
const DRAWN = 20; // tokens at a time

let tokenizer, balanced, unbalanced;
let controls; // what the reader changed of the routers
let reading = null; // the text: { text, ids, pieces, now, before, other }, each a result of `forward`
let chosen = { token: 0, layer: 0 };
let temperature = 1; // of the sampling
let latest = 0; // the number of the last request; older ones give up

async function update() {
  const request = ++latest;
  const isStale = () => request !== latest;
  find("explorer").ariaBusy = true;
  const text = find("text").value;
  const found = read(tokenizer, text, balanced.context);
  find("explorer").classList.toggle("refused", Boolean(found.refusal));
  if (found.refusal) return settle(found.refusal);

  const { ids, pieces } = found;
  const routing = routingOf(balanced, controls);
  const now = await finishWithPauses(forward(balanced, ids, routing), isStale);
  if (!now) return;
  const isSame = reading?.text === text;
  const before = isSame ? reading.before : await finishWithPauses(forward(balanced, ids), isStale);
  if (!before) return;
  if (!isSame) chosen = { ...chosen, token: ids.length - 1 };
  reading = { text, ids, pieces, now, before, routing, other: isSame ? reading.other : null };
  show();
  const other = reading.other ?? (await finishWithPauses(forward(unbalanced, ids), isStale));
  if (!other) return;
  reading.other = other;
  showCompare();
  settle(summary());
}

function settle(words) {
  say(words);
  find("explorer").ariaBusy = false;
}

function show() {
  showStrips();
  showChosen();
}

function say(words) {
  find("status").textContent = words;
}

function summary() {
  const { ids, now, pieces } = reading;
  const load = loadOf(now.routes[chosen.layer], balanced.experts);
  const busiest = load.indexOf(Math.max(...load));
  return `${ids.length} tokens. In layer ${chosen.layer} expert ${busiest} is first choice of most, ${percent(load[busiest])}; “${visible(pieces[chosen.token])}” goes to ${now.routes[chosen.layer][chosen.token].indices.join(", ")}.`;
}

function showStrips() {
  const rows = reading.now.routes.map((choices, layer) => {
    const selected = layer === chosen.layer ? chosen.token : null;
    return create("div", { class: "layer", role: "row" },
      create("span", { class: "name", role: "rowheader" }, `layer ${layer}`),
      strip(layer, reading.pieces, choices, { selected, choose: (token) => choose({ token, layer }) }),
      create("span", { role: "gridcell" }, loadBars(choices, balanced.experts, `Load in layer ${layer}`)));
  });
  find("strips").replaceChildren(...rows);
}

function showChosen() {
  const { token, layer } = chosen;
  const { now, before, pieces, routing } = reading;
  showToken(find("token"), pieces[token], layer, now.routes[layer][token], balanced.layers[layer].router, routing[layer]);
  showPath(find("path"), pieces[token], now.routes.map((choices) => choices[token]), layer);
  showPrediction(find("prediction"), tokenizer, pieces[token], now.logits[token], before.logits[token], temperature);
}

function showCompare() {
  const layer = chosen.layer;
  const sides = [
    ["With a balance loss", reading.before.routes[layer]],
    ["Without", reading.other.routes[layer]],
  ].map(([name, choices]) => {
    const load = loadOf(choices, balanced.experts);
    const most = Math.max(...load);
    const idle = load.filter((share) => !share).length;
    const words = `Layer ${layer}: expert ${load.indexOf(most)} is first choice of ${percent(most)} of the tokens. Experts that are first choice of none: ${idle}.`;
    return create("div", {}, create("h3", {}, name), create("p", {}, words), loadBars(choices, balanced.experts, `${name}, load in layer ${layer}`), strip(layer, reading.pieces, choices));
  });
  find("compare").replaceChildren(create("div", { class: "pair" }, ...sides));
}

// Looks at another token or layer; the focus goes along.
function choose(place) {
  chosen = place;
  show();
  say(summary());
  if (reading.other) showCompare();
  const tile = find("strips").querySelector("[aria-selected=true]");
  tile.focus({ preventScroll: true });
  tile.scrollIntoView({ block: "nearest" });
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-Infinity, 0], End: [Infinity, 0] };

function move(event) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
  choose({ token: within(chosen.token + step[0], reading.ids.length), layer: within(chosen.layer + step[1], balanced.layers.length) });
}

// Adds drawn tokens to the text, one after the other; a few more where the last is half a character.
async function extend(count) {
  const routing = routingOf(balanced, controls);
  let ids = reading.ids;
  const isWhole = () => !decode(tokenizer, ids.slice(-4)).endsWith("\uFFFD");
  for (let drawn = 0; (drawn < count || !isWhole()) && drawn < count + 3 && ids.length < balanced.context; drawn++) {
    const request = ++latest;
    const { logits } = (await finishWithPauses(forward(balanced, ids, routing), () => request !== latest)) ?? {};
    if (!logits) return; // the reader did something else
    ids = [...ids, pick(nextProbabilities(logits.at(-1), temperature), Math.random())];
    find("text").value = decode(tokenizer, ids);
  }
  await update();
}

function showSampling() {
  const button = (id, label, action) => create("button", { type: "button", id, onclick: action }, label);
  const warm = (value) => {
    temperature = value;
    showChosen();
  };
  find("sampling").replaceChildren(
    slider("sampling-temperature", "Temperature of the sampling", { min: 0, max: 2, step: 0.1, value: 1, digits: 1 }, warm),
    create("div", { class: "buttons" }, button("draw", "Add a token", () => extend(1)), button("draw-many", `Add ${DRAWN}`, () => extend(DRAWN))),
  );
}

function showExamples() {
  const buttons = Object.entries(EXAMPLES).map(([name, text]) => create("button", { type: "button", onclick: () => type(text) }, name));
  find("examples").replaceChildren(...buttons);
}

function type(text) {
  find("text").value = text;
  return update();
}

async function start() {
  tokenizer = readTokenizer(MIXTURE.tokenizer);
  balanced = await openModel(MIXTURE.balanced);
  unbalanced = await openModel(MIXTURE.unbalanced);
  controls = asTrained(balanced);
  showExamples();
  showSampling();
  showControls(find("controls"), balanced, (changed) => {
    controls = changed;
    return update();
  });
  find("text").addEventListener("input", update);
  find("strips").addEventListener("keydown", move);
  await update();
  // For whoever opens the console: minimoe.encode(minimoe.tokenizer, "your text").
  const functions = { read, encode, decode, forward, finish, routeTopk, without, routingOf, asTrained, nextProbabilities };
  globalThis.minimoe = { tokenizer, balanced, unbalanced, ...functions };
}

start();
