// WebGPU only where it computes what WebAssembly computes: kernels differ from driver to driver.

import { gaussian } from "./ddim.mjs";
import { difference, SIDE } from "./run.mjs";

const SAME_IMAGE = 1e-3; // what another order of float32 sums leaves after a run is below 1e-4
const CHECKED = { seed: 1, label: 0, guidance: 1.5 };

// How far the images of two providers are apart, at the worst of their runs.
async function apart(some, others) {
  const noise = gaussian(CHECKED.seed, SIDE * SIDE);
  let worst = 0;
  for (const name of Object.keys(some)) {
    const images = [];
    for (const run of [some[name], others[name]]) {
      images.push(await run.image(noise, CHECKED.label, CHECKED.guidance));
    }
    const error = difference(...images);
    worst = error <= worst ? worst : error; // a NaN is the worst of all
  }
  return worst;
}

// The runs to take, and what to tell: those that `openFast` opens where their images are the ones
// of `safe`, else `safe`.
export async function chosen(safe, openFast) {
  try {
    const fast = await openFast();
    const error = await apart(fast, safe);
    return error <= SAME_IMAGE
      ? [fast, `WebGPU; its images are WebAssembly's to ${error.toExponential(0)}`]
      : [safe, `WebAssembly, as WebGPU's images are ${error.toPrecision(2)} off here`];
  } catch (error) {
    return [safe, `WebAssembly, as WebGPU fails here: ${error.message}`];
  }
}
