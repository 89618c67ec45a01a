// Matrices { data, rows, columns } of 64-bit numbers, and what the methods need of them.

export function zeros(rows, columns) {
  return { data: new Float64Array(rows * columns), rows, columns };
}

export function transpose(a) {
  const result = zeros(a.columns, a.rows);
  for (let i = 0; i < a.rows; i++) for (let j = 0; j < a.columns; j++) result.data[j * a.rows + i] = a.data[i * a.columns + j];
  return result;
}

// a b
export function multiply(a, b) {
  const result = zeros(a.rows, b.columns);
  for (let i = 0; i < a.rows; i++) {
    for (let k = 0; k < a.columns; k++) {
      const factor = a.data[i * a.columns + k];
      for (let j = 0; j < b.columns; j++) result.data[i * b.columns + j] += factor * b.data[k * b.columns + j];
    }
  }
  return result;
}

export function mapMatrix(a, change) {
  return { ...a, data: a.data.map((value, place) => change(value, Math.floor(place / a.columns), place % a.columns)) };
}

export function sliceRows(a, from, to) {
  return { data: a.data.slice(from * a.columns, to * a.columns), rows: to - from, columns: a.columns };
}

// exp(a): halved until it is small, summed as a series, squared as often.
export function exponential(a) {
  const size = Math.max(...a.data.map(Math.abs)) * a.rows;
  const halvings = Math.max(0, Math.ceil(Math.log2(size || 1)) + 1);
  const small = mapMatrix(a, (value) => value / 2 ** halvings);
  let term = mapMatrix(zeros(a.rows, a.rows), (_, i, j) => Number(i === j));
  let sum = term;
  for (let n = 1; n <= 18; n++) {
    term = mapMatrix(multiply(term, small), (value) => value / n);
    sum = mapMatrix(sum, (value, i, j) => value + term.data[i * a.rows + j]);
  }
  for (let n = 0; n < halvings; n++) sum = multiply(sum, sum);
  return sum;
}

// The singular vectors of a square or tall matrix whose singular values are above a share of the largest: { left, right },
// a column each. One-sided Jacobi: columns are turned until all are orthogonal.
export function singularVectors(a, smallest) {
  const columns = toColumns(a);
  const right = toColumns(mapMatrix(zeros(a.columns, a.columns), (_, i, j) => Number(i === j)));
  for (let sweep = 0, turned = true; turned && sweep < 40; sweep++) {
    turned = false;
    for (let i = 0; i < columns.length; i++) for (let j = i + 1; j < columns.length; j++) turned = orthogonalise(columns, right, i, j) || turned;
  }
  const sizes = columns.map((column) => Math.sqrt(inner(column, column)));
  const kept = sizes.flatMap((size, i) => (size > smallest * Math.max(...sizes) ? [i] : []));
  return { left: fromColumns(kept.map((i) => columns[i].map((value) => value / sizes[i]))), right: fromColumns(kept.map((i) => right[i])) };
}

function orthogonalise(columns, right, i, j) {
  const [x, y] = [columns[i], columns[j]];
  const [xx, yy, xy] = [inner(x, x), inner(y, y), inner(x, y)];
  if (Math.abs(xy) <= 1e-14 * Math.sqrt(xx * yy)) return false;
  const tilt = (yy - xx) / (2 * xy);
  const tangent = (tilt < 0 ? -1 : 1) / (Math.abs(tilt) + Math.sqrt(1 + tilt * tilt));
  const cos = 1 / Math.sqrt(1 + tangent * tangent);
  turn(x, y, cos, cos * tangent);
  turn(right[i], right[j], cos, cos * tangent);
  return true;
}

function turn(x, y, cos, sin) {
  for (let n = 0; n < x.length; n++) [x[n], y[n]] = [cos * x[n] - sin * y[n], sin * x[n] + cos * y[n]];
}

// a = q r with orthogonal columns in q: Gram-Schmidt, each column twice.
export function orthogonal(a) {
  const columns = toColumns(a);
  const r = zeros(a.columns, a.columns);
  columns.forEach((column, j) => {
    for (let i = 0; i < 2 * j; i++) {
      const before = columns[i % j];
      const share = inner(before, column);
      r.data[(i % j) * a.columns + j] += share;
      for (let n = 0; n < column.length; n++) column[n] -= share * before[n];
    }
    const size = Math.sqrt(inner(column, column));
    r.data[j * a.columns + j] = size;
    for (let n = 0; n < column.length; n++) column[n] /= size;
  });
  return { q: fromColumns(columns), r };
}

function toColumns(a) {
  const { data, rows, columns } = transpose(a);
  return Array.from({ length: rows }, (_, i) => data.slice(i * columns, (i + 1) * columns));
}

function fromColumns(columns) {
  const [rows, count] = [columns[0].length, columns.length];
  const result = zeros(rows, count);
  columns.forEach((column, j) => column.forEach((value, i) => (result.data[i * count + j] = value)));
  return result;
}

export function inner(x, y) {
  let sum = 0;
  for (let n = 0; n < x.length; n++) sum += x[n] * y[n];
  return sum;
}

// For each row of a square table a column of its own, of the largest sum: shortest augmenting paths (Kuhn 1955, in the form
// of Jonker & Volgenant 1987).
export function assign({ data, rows: count }) {
  const prices = { row: new Float64Array(count + 1), column: new Float64Array(count + 1) };
  const rowOf = new Int32Array(count + 1); // of each column, counted from 1; column 0 holds the row that is being placed
  for (let row = 1; row <= count; row++) {
    rowOf[0] = row;
    const from = new Int32Array(count + 1);
    const least = new Float64Array(count + 1).fill(Infinity);
    const isUsed = new Uint8Array(count + 1);
    let column = 0;
    do {
      isUsed[column] = 1;
      const current = rowOf[column];
      let step = Infinity;
      let next = 0;
      for (let j = 1; j <= count; j++) {
        if (isUsed[j]) continue;
        const cost = -data[(current - 1) * count + j - 1] - prices.row[current] - prices.column[j];
        if (cost < least[j]) [least[j], from[j]] = [cost, column];
        if (least[j] < step) [step, next] = [least[j], j];
      }
      for (let j = 0; j <= count; j++) {
        if (isUsed[j]) {
          prices.row[rowOf[j]] += step;
          prices.column[j] -= step;
        } else least[j] -= step;
      }
      column = next;
    } while (rowOf[column]);
    for (; column; column = from[column]) rowOf[column] = rowOf[from[column]];
  }
  const found = new Array(count);
  for (let j = 1; j <= count; j++) found[rowOf[j] - 1] = j - 1;
  return found;
}
