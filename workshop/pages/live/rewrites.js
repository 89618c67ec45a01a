// The rewrites that the page offers, in the order in which they are done, under their names in the package.

import { foldNorms, frameNeuronOrder, frameNorms, frameStdProfile, mixVo, permuteNeurons, permuteResidual, rotateResidual, scaleNeurons, scaleQk } from "./gauges.js";
import { readStdProfile } from "./methods.js";

const SEED = 3;

// `most` is where a slider ends; without it there is a tick box. `apply` gets a model, the value, and the model to imitate.
const gauge = (name, label, change, most = null) => ({ name, label, most, apply: (model, amount) => change(model, { seed: SEED, amount: Number(amount) }) });

export const GAUGES = [
  gauge("fold_norms", "Fold norm weights into the matrices", foldNorms),
  gauge("rotate_residual", "Rotate the residual stream", rotateResidual, 1),
  gauge("permute_residual", "Shuffle its dimensions", permuteResidual),
  gauge("scale_qk", "Scale queries, unscale keys", scaleQk, 2),
  gauge("mix_vo", "Mix values, unmix outputs", mixVo, 1),
  gauge("permute_neurons", "Shuffle the neurons", permuteNeurons),
  gauge("scale_neurons", "Scale the neurons", scaleNeurons, 2),
];

export const FRAMES = [
  { name: "frame_norms", label: "Take the norm weights of A", most: null, apply: (model, _, target) => frameNorms(model, target) },
  { name: "frame_std_profile", label: "Take the std profile of A", most: 1, apply: takeStdProfile },
  { name: "frame_neuron_order", label: "Put neurons in the order of A", most: null, apply: (model, _, target) => frameNeuronOrder(model, target) },
];

// A part of the way to the other profile: geometric means of standard deviations.
function takeStdProfile(model, degree, target) {
  const [start, end] = [readStdProfile(model), readStdProfile(target)];
  const between = Object.entries(start).map(([role, curve]) => [role, curve.map((value, layer) => value ** (1 - degree) * end[role][layer] ** degree)]);
  return frameStdProfile(model, Object.fromEntries(between));
}

// The model after all rewrites that `amounts`, by name, asks for.
export function rewrite(model, amounts, target) {
  const wanted = [...GAUGES, ...FRAMES].filter(({ name }) => amounts[name]);
  return wanted.reduce((changed, { name, apply }) => apply(changed, amounts[name], target), model);
}
