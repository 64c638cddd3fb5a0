// What samples/fashion_dit/diffusion.py does between two calls of the model.

// One DDIM step with guidance. `output` holds the conditional half, then the unconditional one;
// `alpha` and `alphaAfter` are the shares of the image, squared, in this step's latent and the next.
export function ddimStep(x, output, guidance, alpha, alphaAfter) {
  return x.map((value, i) => {
    const unconditional = output[x.length + i];
    const epsilon = unconditional + guidance * (output[i] - unconditional);
    const clean = (value - Math.sqrt(1 - alpha) * epsilon) / Math.sqrt(alpha);
    return Math.sqrt(alphaAfter) * clean + Math.sqrt(1 - alphaAfter) * epsilon;
  });
}

// Standard normal numbers, the same for a seed on every machine: mulberry32, Box and Muller.
export function gaussian(seed, length) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float32Array.from({ length }, () =>
    Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}
