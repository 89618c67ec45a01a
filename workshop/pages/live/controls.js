// What a reader may change of the routers: how many experts, how sharply, who is switched off, who is favoured, and where.

import { chip, create, fixed } from "./dom.js";

export function asTrained(model) {
  return { layers: "all", k: model.k, temperature: 1, off: [], bias: new Array(model.experts).fill(0) };
}

// How the router of each layer is to choose, as `forward` takes it.
export function routingOf(model, { layers, k, temperature, off, bias }) {
  const changed = { k, temperature, off, bias: bias.some(Boolean) ? bias : null };
  return model.routing.map((trained, layer) => (layers === "all" || Number(layers) === layer ? changed : trained));
}

// Builds the controls; `change(controls)` is called whenever one is moved.
export function showControls(place, model, change) {
  let controls = asTrained(model);
  const set = (key, value) => change((controls = { ...controls, [key]: value }));
  const build = () => {
    const choices = ["all", ...model.layers.keys()].map((layer) => create("option", { value: layer }, layer === "all" ? "all layers" : `layer ${layer}`));
    place.replaceChildren(
      create("label", { class: "row" }, "Change", create("select", { id: "where", onchange: (event) => set("layers", event.target.value) }, ...choices)),
      slider("k", "Experts per token, K", { min: 1, max: model.experts, step: 1, value: controls.k, digits: 0 }, (value) => set("k", value)),
      slider("temperature", "Temperature of the router", { min: 0.1, max: 4, step: 0.1, value: 1, digits: 1 }, (value) => set("temperature", value)),
      create("div", { class: "row heads" }, create("span", {}, "Expert"), create("span", {}, "on"), create("span", {}, "selection bias")),
      ...controls.bias.map((_, expert) => expertRow(expert)),
      create("button", { type: "button", id: "reset", onclick: reset }, "As trained"),
    );
  };
  const expertRow = (expert) => {
    const number = create("output", {}, fixed(0));
    const turn = ({ target }) => set("off", target.checked ? controls.off.filter((other) => other !== expert) : [...controls.off, expert]);
    const favour = ({ target }) => {
      number.textContent = fixed(target.valueAsNumber);
      set("bias", controls.bias.with(expert, target.valueAsNumber));
    };
    const box = create("input", { type: "checkbox", id: `on-${expert}`, checked: "", "aria-label": `Expert ${expert} is on`, onchange: turn });
    const range = create("input", { type: "range", id: `bias-${expert}`, min: -0.5, max: 0.5, step: 0.05, value: 0, "aria-label": `Selection bias of expert ${expert}`, oninput: favour });
    return create("div", { class: "row expert-row" }, chip(expert), box, range, number);
  };
  const reset = () => {
    change((controls = asTrained(model)));
    build();
    place.querySelector("#reset").focus();
  };
  build();
}

export function slider(id, label, { digits, ...range }, change) {
  const number = create("output", { for: id }, fixed(range.value, digits));
  const move = ({ target }) => {
    number.textContent = fixed(target.valueAsNumber, digits);
    change(target.valueAsNumber);
  };
  const input = create("input", { type: "range", id, ...range, oninput: move });
  return create("div", { class: "slider" }, create("label", { for: id }, label), number, input);
}
