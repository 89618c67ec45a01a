// Elements, numbers and tokens as the page shows them.

export const COLOURS = ["#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#DDDDDD"]; // minimoe/course/style.py

export const find = (id) => document.getElementById(id);

// An element with attributes and children; an attribute "on..." is what is done then.
export function create(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

// The same of SVG.
export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [rule, what] of Object.entries(value)) element.style.setProperty(rule, what);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// A token with marks for white space, and for parts of characters.
export function visible(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll("\uFFFD", "▯") || "▯";
}

export const percent = (share) => `${Math.round(100 * share)} %`;

export const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");

// A bar from 0 to `share` of the width, beside a label and a number; `mark` is a second share, as a tick.
export function bar({ label, share, number, colour, chosen = true, mark = null }) {
  const filled = create("span", { class: chosen ? "filled" : "filled pale", style: { width: `${100 * share}%`, "--colour": colour } });
  const tick = mark === null ? [] : [create("span", { class: "tick", style: { left: `${100 * mark}%` } })];
  return create("div", { class: "bar" }, create("span", { class: "label" }, label), create("span", { class: "track" }, filled, ...tick), create("span", { class: "number" }, number));
}

export function chip(expert, ...children) {
  return create("span", { class: "chip", style: { "--colour": COLOURS[expert % COLOURS.length] } }, String(expert), ...children);
}
