// Four methods that compare two models of one shape: minimoe/fingerprints in JavaScript.

import { assign, inner, mapMatrix, multiply, orthogonal, singularVectors, sliceRows, transpose } from "./algebra.js";
import { resemblance } from "./gauges.js";

const ROLES = ["q", "k", "v", "o"];
const SMALLEST_P = 1e-300;
const SMALLEST_VALUE = 1e-4; // singular values below this share of the largest are rounding

// --- std_profile

// The standard deviation of Q, K, V and O in each layer.
export function readStdProfile({ layers }) {
  return Object.fromEntries(ROLES.map((role) => [role, layers.map((layer) => deviation(layer[role].data))]));
}

// The mean correlation of the four curves.
export function stdProfile(a, b) {
  const [ours, theirs] = [readStdProfile(a), readStdProfile(b)];
  return mean(ROLES.map((role) => pearson(ours[role], theirs[role])));
}

// --- norm_profile

export function normsOf(model) {
  return [...model.layers.flatMap(({ norm1, norm2 }) => [norm1, norm2]), model.norm];
}

// The mean correlation of norm weights; null where those of a norm are all the same.
export function normProfile(a, b) {
  const [ours, theirs] = [normsOf(a), normsOf(b)];
  const isFlat = (norm) => norm.every((weight) => weight === norm[0]);
  if ([...ours, ...theirs].some(isFlat)) return null;
  return mean(ours.map((norm, number) => pearson(norm, theirs[number])));
}

// --- csu

// Whether neurons that resemble each other stand at the same place: { rho, p, places }, `places` being those of the first layer.
// A generator that yields after each layer.
export function* csu(a, b) {
  const found = [];
  for (const [number, layer] of a.layers.entries()) {
    found.push(assign(resemblance(layer, b.layers[number])));
    yield;
  }
  const tests = found.map(againstOrder);
  return { rho: mean(tests.map(({ rho }) => rho)), p: fisher(tests.map(({ p }) => p)), places: found[0] };
}

// Spearman's rho of an assignment with the order 0, 1, 2, ..., and the p-value of one at least as large by chance.
function againstOrder(places) {
  const rho = pearson(places, Array.from(places.keys()));
  const freedom = places.length - 2;
  return { rho, p: studentTail(rho * Math.sqrt(freedom / Math.max((1 - rho) * (1 + rho), 1e-300)), freedom) };
}

// One p-value of several independent ones (Fisher 1932): the tail of a chi-squared distribution.
function fisher(values) {
  const half = -values.reduce((sum, p) => sum + Math.log(Math.max(p, SMALLEST_P)), 0);
  let [term, sum] = [1, 1];
  for (let n = 1; n < values.length; n++) sum += term *= half / n;
  return Math.max(Math.exp(Math.log(sum) - half), SMALLEST_P);
}

// The probability that Student's t is larger than `t`.
function studentTail(t, freedom) {
  const tail = incompleteBeta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2;
  return t < 0 ? 1 - tail : tail;
}

// The regularised incomplete beta function, by its continued fraction (Lentz 1976).
function incompleteBeta(x, a, b) {
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  const front = Math.exp(a * Math.log(x) + b * Math.log1p(-x) - logGamma(a) - logGamma(b) + logGamma(a + b)) / a;
  let [c, d, fraction] = [1, 0, 1];
  for (let step = 1; step < 400; step++) {
    const m = Math.floor(step / 2);
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    const numerator = step % 2 ? odd : even;
    d = 1 / (1 + numerator * d);
    c = 1 + numerator / c;
    fraction *= c * d;
    if (Math.abs(c * d - 1) < 1e-15) break;
  }
  return front / fraction;
}

function logGamma(x) {
  const terms = [76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155, 1.208650973866179e-3, -5.395239384953e-6];
  const sum = terms.reduce((total, term, n) => total + term / (x + 1 + n), 1.000000000190015);
  return (x + 0.5) * Math.log(x + 5.5) - (x + 5.5) + Math.log((2.5066282746310005 * sum) / x);
}

// --- virtual_response, whitened

// What each layer answers to single tokens, all directions alike: three tables a layer, { left, right } of each. Heads count alike
// here, as they do in Python where every head writes about as much as the others.
// A generator that yields after each table.
export function* readResponses(model, tokens) {
  const rowsOf = (matrix) => stackRows(tokens.map((id) => sliceRows(matrix, id, id + 1)));
  const embedded = rowsOf(model.embedding);
  const sizes = tokens.map((_, n) => Math.sqrt(mean(sliceRows(embedded, n, n + 1).data.map((value) => value * value))));
  const inputs = mapMatrix(embedded, (value, i) => value / sizes[i]);
  const outputs = byColumns(rowsOf(model.head), model.norm);
  const found = [];
  for (const layer of model.layers) {
    const x = byColumns(inputs, layer.norm1);
    const asked = addGroups(multiply(x, transpose(layer.q)), layer);
    found.push(whitened(asked, multiply(x, transpose(layer.k))));
    yield;
    const written = addGroups(layer.o, layer);
    found.push(whitened(multiply(x, transpose(layer.v)), multiply(outputs, written)));
    yield;
    const y = byColumns(inputs, layer.norm2);
    const opened = multiply(y, transpose(layer.gate)).data;
    const driven = mapMatrix(multiply(y, transpose(layer.up)), (value, i, j) => {
      const gate = opened[i * layer.up.rows + j];
      return (gate / (1 + Math.exp(-gate))) * value;
    });
    found.push(whitened(multiply(driven, transpose(layer.down)), outputs));
    yield;
  }
  return found;
}

// The correlation of each table with its counterpart.
export function compareResponses(a, b) {
  return a.map((table, number) => overlap(table, b[number]));
}

// The directions of the table p q^T, rows and columns centred, whatever its singular values.
function whitened(p, q) {
  const [ours, theirs] = [orthogonal(centred(p)), orthogonal(centred(q))];
  const { left, right } = singularVectors(multiply(ours.r, transpose(theirs.r)), SMALLEST_VALUE);
  return { left: multiply(ours.q, left), right: multiply(theirs.q, right) };
}

function overlap(a, b) {
  const [left, right] = [multiply(transpose(a.left), b.left), multiply(transpose(a.right), b.right)];
  return inner(left.data, right.data) / Math.sqrt(a.left.columns * b.left.columns);
}

function centred(a) {
  const means = Array.from({ length: a.columns }, (_, j) => {
    let sum = 0;
    for (let i = 0; i < a.rows; i++) sum += a.data[i * a.columns + j];
    return sum / a.rows;
  });
  return mapMatrix(a, (value, _, j) => value - means[j]);
}

// Adds up the columns of query heads that share keys and values.
function addGroups(a, { k, headSize }) {
  const each = a.columns / k.rows;
  const sum = { data: new Float64Array(a.rows * k.rows), rows: a.rows, columns: k.rows };
  a.data.forEach((value, place) => {
    const [i, j] = [Math.floor(place / a.columns), place % a.columns];
    sum.data[i * k.rows + Math.floor(j / headSize / each) * headSize + (j % headSize)] += value;
  });
  return sum;
}

function byColumns(a, weights) {
  return mapMatrix(a, (value, _, j) => value * weights[j]);
}

function stackRows(rows) {
  return { data: Float64Array.from(rows.flatMap(({ data }) => Array.from(data))), rows: rows.length, columns: rows[0].columns };
}

// --- statistics

export function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

export function deviation(values) {
  const middle = mean(values);
  return Math.sqrt(mean(values.map((value) => (value - middle) ** 2)));
}

export function pearson(x, y) {
  const [ofX, ofY] = [mean(x), mean(y)];
  const product = mean(Array.from(x, (value, n) => (value - ofX) * (y[n] - ofY)));
  return product / (deviation(x) * deviation(y));
}
