// A run of one artifact in the layout `step`: a session, and the caches that go from step to step.

import { ddimStep } from "./ddim.mjs";

export const SIDE = 28;
const IMAGE = [2, 1, SIDE, SIDE]; // with the class and without

export class Run {
  // `ort` is onnxruntime-web; `site` is runs.json, `about` the run's entry there.
  constructor(ort, session, site, about) {
    Object.assign(this, { ort, session, site, about });
  }

  // Yields { latent, seconds } after every step; seconds are those of the arithmetic alone.
  async *sample(noise, label, guidance) {
    const { timesteps, alphaBars } = this.site;
    let caches = this.#emptyCaches();
    let latent = noise;
    for (const [step, time] of timesteps.entries()) {
      const started = performance.now();
      const { output, kept } = await this.#call(step, latent, time, label, caches);
      latent = ddimStep(latent, output, guidance, alphaBars[step], alphaBars[step + 1]);
      caches = kept;
      yield { latent, seconds: (performance.now() - started) / 1000 };
    }
  }

  // The image after the last step.
  async image(noise, label, guidance) {
    let latent;
    for await (const step of this.sample(noise, label, guidance)) latent = step.latent;
    return latent;
  }

  async #call(step, latent, time, label, caches) {
    const { Tensor } = this.ort;
    const whole = (numbers) => BigInt64Array.from(numbers.map(BigInt));
    const inputs = {
      hidden_states: new Tensor("float32", Float32Array.of(...latent, ...latent), IMAGE),
      timestep: new Tensor("int64", whole([time, time]), [2]),
      class_labels: new Tensor("int64", whole([label, this.site.nullClass]), [2]),
      step: new Tensor("int64", whole([step]), []),
      ...caches,
    };
    const taken = Object.fromEntries(
      this.session.inputNames.map((name) => [name, inputs[name]]));
    const named = this.about.writes[step].map((name) => `${name}_next`);
    const results = await this.session.run(taken, [this.about.output, ...named]);
    return { output: results[this.about.output].data, kept: this.#pushed(caches, results) };
  }

  // Zeros: a value that has not been yet has the weight 0.
  #emptyCaches() {
    const slots = this.about.caches.flatMap(({ shape, kept }) => kept.map((name) => [name, shape]));
    return Object.fromEntries(slots.map(([name, shape]) => {
      const size = shape.reduce((product, length) => product * length, 1);
      return [name, new this.ort.Tensor("float32", new Float32Array(size), shape)];
    }));
  }

  // Where a step wrote a cache, every name moves to the next older place, and its value comes in front.
  #pushed(caches, results) {
    const written = this.about.caches.filter(({ kept }) => `${kept[0]}_next` in results);
    const pairs = written.flatMap(({ kept }) => kept.map((name, back) =>
      [name, back ? caches[kept[back - 1]] : results[`${name}_next`]]));
    return { ...caches, ...Object.fromEntries(pairs) };
  }
}

// Relative L2 difference.
export function difference(one, other) {
  let apart = 0;
  let size = 0;
  for (let i = 0; i < one.length; i++) {
    apart += (one[i] - other[i]) ** 2;
    size += other[i] ** 2;
  }
  return Math.sqrt(apart / size);
}
