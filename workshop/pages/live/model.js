// A decoder-only transformer whose MLPs may be mixtures of experts: the forward pass, whole.
//
// A text of T tokens is an array of T vectors. A matrix is { data, rows, columns }, row after row.

import { routeTopk, softmax, without } from "./routing.js";

// Runs the model on token ids, and yields after each half of a layer, so that a page can draw and answer in between.
//
// `routing[layer]` is how its router is to choose: { k, temperature, bias, off }, `off` being a list of experts.
// Returns { logits: T x V, routes: layers x T }: of every token its input, choice and the outputs of its experts.
export function* forward(model, ids, routing = model.routing) {
  let x = ids.map((id) => row(model.embedding, id));
  const routes = [];
  for (const [number, layer] of model.layers.entries()) {
    const attended = attend(model, layer, x.map((vector) => norm(vector, layer.norm1, model.eps)));
    x = x.map((vector, t) => add(vector, linear(layer.o, attended[t])));
    yield;
    const normed = x.map((vector) => norm(vector, layer.norm2, model.eps));
    const mixed = normed.map((vector) => (layer.router ? mix(layer, vector, routing[number]) : { output: expert(layer, vector) }));
    x = x.map((vector, t) => add(vector, mixed[t].output));
    routes.push(mixed);
    yield;
  }
  return { logits: x.map((vector) => linear(model.head, norm(vector, model.norm, model.eps))), routes };
}

// One mixture of experts: the router scores all experts, the best compute, their outputs are weighted and added.
function mix(layer, input, { k, temperature, bias, off }) {
  const choice = routeTopk(Array.from(linear(layer.router, input)), k, { temperature, bias });
  const chosen = off.reduce(without, choice);
  const outputs = chosen.indices.map((index) => expert(layer.experts[index], input));
  const output = new Float64Array(input.length);
  outputs.forEach((vector, slot) => vector.forEach((value, i) => (output[i] += chosen.weights[slot] * value)));
  return { input, ...chosen, outputs, output };
}

// An expert, or the MLP of a dense layer: down(silu(gate(x)) * up(x)).
function expert({ gate, up, down }, x) {
  const opened = linear(gate, x);
  const driven = linear(up, x);
  return linear(down, driven.map((value, i) => (opened[i] / (1 + Math.exp(-opened[i]))) * value));
}

// Every token looks at itself and at those before it: its queries ask, their keys answer, their values are added.
function attend({ heads, frequencies }, { q, k, v, headSize }, x) {
  const queries = x.map((vector, t) => rotate(linear(q, vector), t, headSize, frequencies));
  const keys = x.map((vector, t) => rotate(linear(k, vector), t, headSize, frequencies));
  const values = x.map((vector) => linear(v, vector));
  const queriesEach = (heads * headSize) / k.rows; // some heads may share keys and values
  return queries.map((query, t) => {
    const output = new Float64Array(heads * headSize);
    for (let head = 0; head < heads; head++) {
      const own = head * headSize;
      const shared = Math.floor(head / queriesEach) * headSize;
      const logits = [];
      for (let s = 0; s <= t; s++) logits.push(dot(query, own, keys[s], shared, headSize) / Math.sqrt(headSize));
      softmax(logits).forEach((weight, s) => {
        for (let i = 0; i < headSize; i++) output[own + i] += weight * values[s][shared + i];
      });
    }
    return output;
  });
}

// Turns the pairs (i, i + D/2) of every head by angles that grow with the position.
function rotate(vector, position, headSize, frequencies) {
  const half = headSize / 2;
  const turned = vector.slice();
  for (let i = 0; i < vector.length; i++) {
    const pair = i % headSize;
    if (pair >= half) continue;
    const cos = Math.cos(position * frequencies[pair]);
    const sin = Math.sin(position * frequencies[pair]);
    turned[i] = vector[i] * cos - vector[i + half] * sin;
    turned[i + half] = vector[i + half] * cos + vector[i] * sin;
  }
  return turned;
}

function norm(x, weight, eps) {
  const size = Math.sqrt(dot(x, 0, x, 0, x.length) / x.length + eps);
  return x.map((value, i) => (value / size) * weight[i]);
}

export function linear({ data, rows, columns }, x) {
  const output = new Float64Array(rows);
  for (let r = 0; r < rows; r++) output[r] = dot(data, r * columns, x, 0, columns);
  return output;
}

function dot(a, fromA, b, fromB, length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += a[fromA + i] * b[fromB + i];
  return sum;
}

function add(a, b) {
  return a.map((value, i) => value + b[i]);
}

export function row({ data, columns }, number) {
  return Float64Array.from(data.subarray(number * columns, (number + 1) * columns));
}

// The model in tensors by the names of Hugging Face, whose experts lie in three tensors a layer.
export function buildModel(config, tensors) {
  const matrix = (name) => {
    const { shape: [rows, columns], data } = tensors[name];
    return { data, rows, columns };
  };
  const expertsOf = (name) => Array.from({ length: config.experts }, (_, e) => expertMatrices(tensors, name, e));
  const readLayer = (_, number) => {
    const name = `model.layers.${number}`;
    const [q, k, v, o] = ["q", "k", "v", "o"].map((role) => matrix(`${name}.self_attn.${role}_proj.weight`));
    const [gate, up, down] = config.experts ? [] : ["gate", "up", "down"].map((role) => matrix(`${name}.mlp.${role}_proj.weight`));
    return {
      q, k, v, o, gate, up, down,
      headSize: config.headSize,
      norm1: tensors[`${name}.input_layernorm.weight`].data,
      norm2: tensors[`${name}.post_attention_layernorm.weight`].data,
      ...(config.experts && { router: matrix(`${name}.mlp.gate.weight`), experts: expertsOf(`${name}.mlp.experts`) }),
    };
  };
  const embedding = matrix("model.embed_tokens.weight");
  return {
    ...config,
    frequencies: Array.from({ length: config.headSize / 2 }, (_, pair) => config.theta ** ((-2 * pair) / config.headSize)),
    embedding,
    layers: Array.from({ length: config.layers }, readLayer),
    norm: tensors["model.norm.weight"].data,
    head: embedding,
    routing: Array.from({ length: config.layers }, () => ({ k: config.k, temperature: 1, bias: null, off: [] })),
  };
}

function expertMatrices(tensors, name, number) {
  const part = (role) => {
    const { shape: [, rows, columns], data } = tensors[`${name}.${role}_proj`];
    return { data: data.subarray(number * rows * columns, (number + 1) * rows * columns), rows, columns };
  };
  return { gate: part("gate"), up: part("up"), down: part("down") };
}

// The result of `forward`, at once.
export function finish(steps) {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
  }
}

// The result of `forward`, with pauses in which a page can draw; null if `isStale()` by then.
export async function finishWithPauses(steps, isStale) {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
    await new Promise((resolve) => setTimeout(resolve));
    if (isStale()) return null;
  }
}
