// Rewrites of a dense model: gauges and frames leave what it computes as it is, whatever they do to its weights.
// minimoe/lineage/gauge.py and frame.py in JavaScript; a seed gives the same model as there. Nothing is changed in place.

import { assign, exponential, mapMatrix, multiply, sliceRows, transpose, zeros } from "./algebra.js";
import { Generator } from "./random.js";

const READERS = { norm1: ["q", "k", "v"], norm2: ["gate", "up"] };

// --- the residual stream

export function foldNorms(model) {
  const ones = new Float64Array(model.norm.length).fill(1);
  return replaceNorms(model, model.layers.map(() => ({ norm1: ones, norm2: ones })), ones);
}

// Gives norms other weights, and what reads them the ratio: W <- W diag(old / new).
function replaceNorms(model, norms, last) {
  const rescale = (matrix, old, now) => mapMatrix(matrix, (value, _, j) => value * (old[j] === now[j] ? 1 : old[j] / now[j]));
  const layers = model.layers.map((layer, number) => {
    const changed = { ...layer, ...norms[number] };
    for (const [norm, readers] of Object.entries(READERS)) for (const role of readers) changed[role] = rescale(layer[role], layer[norm], changed[norm]);
    return changed;
  });
  return { ...model, layers, norm: last, head: rescale(model.head, model.norm, last) };
}

export function rotateResidual(model, { seed, amount = 1 }) {
  const back = transpose(exponential(skew(model.norm.length, amount, new Generator(seed))));
  return changeBasis(foldNorms(model), (rows) => multiply(rows, back));
}

export function permuteResidual(model, { seed }) {
  const generator = new Generator(seed);
  const order = generator.permutation(model.norm.length);
  const sign = order.map(() => 1 - 2 * generator.integer(2));
  const reorder = (norm) => Float64Array.from(order, (from) => norm[from]);
  const changed = changeBasis(model, (rows) => mapMatrix(rows, (_, i, j) => sign[j] * rows.data[i * rows.columns + order[j]]));
  const layers = changed.layers.map((layer) => ({ ...layer, norm1: reorder(layer.norm1), norm2: reorder(layer.norm2) }));
  return { ...changed, layers, norm: reorder(model.norm) };
}

// Applies `change` to all that reads the residual stream or writes to it, as rows.
function changeBasis(model, change) {
  const layers = model.layers.map((layer) => {
    const reading = ["q", "k", "v", "gate", "up"].map((role) => [role, change(layer[role])]);
    const writing = ["o", "down"].map((role) => [role, transpose(change(transpose(layer[role])))]);
    return { ...layer, ...Object.fromEntries([...reading, ...writing]) };
  });
  return { ...model, layers, embedding: change(model.embedding), head: change(model.head) };
}

// --- attention

export function scaleQk(model, { seed, amount = 1 }) {
  const generator = new Generator(seed);
  return mapLayers(model, (layer) => scalePairs(layer, factors(groupsOf(layer) * (layer.headSize / 2), amount, generator)));
}

// Multiplies the rotary pairs of a group's queries by factors, and divides those of its keys.
function scalePairs(layer, by) {
  const half = layer.headSize / 2;
  const scale = (rows, change) => {
    const each = rows.rows / groupsOf(layer); // rows of a group
    return mapMatrix(rows, (value, i) => change(value, by[Math.floor(i / each) * half + (i % half)]));
  };
  return { ...layer, q: scale(layer.q, (value, factor) => value * factor), k: scale(layer.k, (value, factor) => value / factor) };
}

export function mixVo(model, { seed, amount = 1 }) {
  const generator = new Generator(seed);
  return mapLayers(model, (layer) => {
    const [groups, size] = [groupsOf(layer), layer.headSize];
    const exponents = Array.from({ length: groups }, () => skew(size, amount, generator));
    const stretched = factors(groups * size, amount, generator);
    exponents.forEach((exponent, group) => {
      for (let i = 0; i < size; i++) exponent.data[i * size + i] += Math.log(stretched[group * size + i]);
    });
    const inverses = exponents.map((exponent) => exponential(mapMatrix(exponent, (value) => -value)));
    return mapValues(layer, exponents.map(exponential), inverses);
  });
}

// Multiplies each group's values by a matrix, and undoes it in the output projection.
function mapValues(layer, maps, inverses) {
  const size = layer.headSize;
  const columns = transpose(layer.o);
  const each = columns.rows / size / maps.length; // heads of a group
  const heads = Array.from({ length: columns.rows / size }, (_, head) =>
    multiply(transpose(inverses[Math.floor(head / each)]), sliceRows(columns, head * size, (head + 1) * size)),
  );
  const values = maps.map((map, group) => multiply(map, sliceRows(layer.v, group * size, (group + 1) * size)));
  return { ...layer, v: stack(values), o: transpose(stack(heads)) };
}

// --- neurons

export function permuteNeurons(model, { seed }) {
  const generator = new Generator(seed);
  return mapLayers(model, (layer) => {
    const numbers = uniform(layer.up.rows, 1, generator);
    return takeNeurons(layer, Array.from(numbers.keys()).sort((a, b) => numbers[a] - numbers[b]));
  });
}

function takeNeurons(layer, order) {
  const take = (rows) => mapMatrix(rows, (_, i, j) => rows.data[order[i] * rows.columns + j]);
  return { ...layer, gate: take(layer.gate), up: take(layer.up), down: transpose(take(transpose(layer.down))) };
}

export function scaleNeurons(model, { seed, amount = 1 }) {
  const generator = new Generator(seed);
  return mapLayers(model, (layer) => {
    const sizes = factors(layer.up.rows, amount, generator);
    const by = sizes.map((size) => (generator.single() < amount / 2 ? -size : size));
    return { ...layer, up: mapMatrix(layer.up, (value, i) => value * by[i]), down: mapMatrix(layer.down, (value, _, j) => value / by[j]) };
  });
}

// --- frames: the fingerprint of another model

export function frameNorms(model, target) {
  return replaceNorms(model, target.layers.map(({ norm1, norm2 }) => ({ norm1, norm2 })), target.norm);
}

// Gives the standard deviations of Q, K, V and O the profile of `target`, { q: [L], k, v, o }: queries and keys exchange a
// factor in each rotary pair, values and output columns in each dimension.
export function frameStdProfile(model, target) {
  let { layers } = model;
  for (const roles of [["q", "k"], ["v", "o"]]) {
    const squares = layers.map((layer) => roles.map((role) => squaresOf(layer, role)));
    const sums = layers.map((layer, number) => roles.map((role) => target[role][number] ** 2 * layer[role].data.length));
    const least = squares.map(([p, n]) => sumOf(p, (value, i) => Math.sqrt(value * n[i])) ** 2);
    const reach = Math.max(1, Math.sqrt(Math.max(...least.map((value, number) => value / (sums[number][0] * sums[number][1])))));
    layers = layers.map((layer, number) => {
      const by = solve(...squares[number], ...sums[number].map((sum) => sum * reach));
      return roles[0] === "q" ? scalePairs(layer, by) : scaleValues(layer, by);
    });
  }
  return { ...model, layers };
}

function scaleValues(layer, by) {
  const size = layer.headSize;
  const diagonal = (group, change) => mapMatrix(zeros(size, size), (_, i, j) => (i === j ? change(by[group * size + i]) : 0));
  const groups = Array.from({ length: groupsOf(layer) }, (_, group) => group);
  return mapValues(layer, groups.map((group) => diagonal(group, (factor) => factor)), groups.map((group) => diagonal(group, (factor) => 1 / factor)));
}

// Sums of squares of what exchanges a factor: the rotary pairs of Q or K, or the dimensions of the values in V or O.
function squaresOf(layer, role) {
  const rows = role === "o" ? transpose(layer.o) : layer[role];
  const size = "qk".includes(role) ? layer.headSize / 2 : layer.headSize;
  const [groups, sums] = [groupsOf(layer), new Float64Array(groupsOf(layer) * size)];
  rows.data.forEach((value, place) => {
    const i = Math.floor(place / rows.columns);
    sums[Math.floor(i / (rows.rows / groups)) * size + (i % size)] += value * value;
  });
  return sums;
}

// The c with sum p c^2 = first and sum n / c^2 = second: c^2 = sqrt(n / p) makes the product of the sums smallest; e^s in every
// second unit and e^-s in the others raises it; a common factor sets the quotient.
function solve(p, n, first, second) {
  const shared = p.map((value, i) => Math.sqrt(value * n[i]));
  const [plus, minus] = [0, 1].map((side) => sumOf(shared, (value, i) => (i % 2 === side ? value : 0)));
  const cosh = (first * second - plus ** 2 - minus ** 2) / (2 * plus * minus);
  const spread = Math.acosh(Math.max(cosh, 1)) / 2;
  const even = p.map((value, i) => Math.sqrt(n[i] / value) * Math.exp(i % 2 ? -spread : spread));
  const common = first / sumOf(p, (value, i) => value * even[i]);
  return even.map((value) => Math.sqrt(value * common));
}

// Gives each neuron the number of one in `target` that it resembles.
export function frameNeuronOrder(model, target) {
  const layers = model.layers.map((layer, number) => takeNeurons(layer, assign(resemblance(target.layers[number], layer))));
  return { ...model, layers };
}

// The cosines of the up rows of two layers, the norm before them folded in.
export function resemblance(one, other) {
  return multiply(upDirections(one), transpose(upDirections(other)));
}

function upDirections({ up, norm2 }) {
  const folded = mapMatrix(up, (value, _, j) => value * norm2[j]);
  const sizes = Array.from({ length: up.rows }, (_, i) => Math.sqrt(sumOf(sliceRows(folded, i, i + 1).data, (value) => value * value)));
  return mapMatrix(folded, (value, i) => value / sizes[i]);
}

// --- what they share

function mapLayers(model, change) {
  return { ...model, layers: model.layers.map(change) };
}

// Of heads that share keys and values.
function groupsOf({ k, headSize }) {
  return k.rows / headSize;
}

function stack(parts) {
  const data = Float64Array.from(parts.flatMap((part) => Array.from(part.data)));
  return { data, rows: data.length / parts[0].columns, columns: parts[0].columns };
}

function uniform(count, amount, generator) {
  return Float64Array.from({ length: count }, () => amount * (2 * generator.double() - 1));
}

function factors(count, amount, generator) {
  return uniform(count, amount, generator).map((exponent) => 2 ** exponent);
}

// A skew-symmetric matrix, whose exponential turns planes by up to `amount` times half a circle.
function skew(size, amount, generator) {
  const entries = uniform(size * size, amount, generator);
  const scale = Math.PI / Math.sqrt((8 * size) / 3);
  return mapMatrix(zeros(size, size), (_, i, j) => scale * (entries[i * size + j] - entries[j * size + i]));
}

function sumOf(values, change) {
  return values.reduce((sum, value, i) => sum + change(value, i), 0);
}
