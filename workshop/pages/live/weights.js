// Weights as they come with the page: numbers of 16 or 8 bits, deflated, in the 85 letters of Python's base64.b85encode.

const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~";

// { tensors: [[name, shape, bits], ...], weights, size } -> the tensors by name, { shape, data }.
//
// After inflation come the high bytes of all half-precision numbers, their low bytes, then the 8-bit integers. A tensor of 8
// bits has a half-precision scale for each row.
export async function readTensors({ tensors, weights, size }, FloatArray = Float32Array) {
  const bytes = await inflate(fromBase85(weights).slice(0, size));
  const countHalves = ([, shape, bits]) => (bits === 16 ? sizeOf(shape) : sizeOf(shape.slice(0, -1)));
  const halves = tensors.reduce((sum, tensor) => sum + countHalves(tensor), 0);
  const integers = new Int8Array(bytes.buffer, 2 * halves);
  let half = 0;
  let integer = 0;
  const nextHalf = () => fromHalf((bytes[half] << 8) | bytes[halves + half++]);

  const readRows = (data, columns) => {
    for (let start = 0; start < data.length; start += columns) {
      const scale = nextHalf();
      for (let i = 0; i < columns; i++) data[start + i] = scale * integers[integer++];
    }
  };
  const read = ([name, shape, bits]) => {
    const data = new FloatArray(sizeOf(shape));
    if (bits === 16) for (let i = 0; i < data.length; i++) data[i] = nextHalf();
    else readRows(data, shape.at(-1));
    return [name, { shape, data }];
  };
  return Object.fromEntries(tensors.map(read));
}

function sizeOf(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

// Sign, five bits of exponent, ten of fraction.
function fromHalf(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

// Five letters are four bytes.
function fromBase85(text) {
  const values = new Uint8Array(128);
  for (let value = 0; value < 85; value++) values[ALPHABET.charCodeAt(value)] = value;
  const bytes = new DataView(new ArrayBuffer((text.length / 5) * 4));
  for (let place = 0; place < text.length; place += 5) {
    let word = 0;
    for (let i = 0; i < 5; i++) word = word * 85 + values[text.charCodeAt(place + i)];
    bytes.setUint32((place / 5) * 4, word);
  }
  return bytes.buffer;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
