// Loads the runs and samples them, away from the page's own thread.

import { gaussian } from "./ddim.mjs";
import { difference, Run, SIDE } from "./run.mjs";

const MAX_THREADS = 4;
const SAME_IMAGE = 1e-3; // what two orders of float32 sums leave after a run is below 1e-4
const CHECKED = { seed: 1, label: 0, guidance: 1.5 };

let runs;
const here = (name) => new URL(name, import.meta.url).href;

// The bytes of a file; `report` gets the bytes that have come.
async function download(name, report) {
  const answer = await fetch(here(name));
  if (!answer.ok) throw new Error(`${name}: the server answers ${answer.status}`);
  const parts = [];
  for (const reader = answer.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    report(value.length);
  }
}

// All files that a run in `runtime` needs, by name.
async function downloadAll(site, runtime) {
  const graphs = Object.keys(site.runs).map((name) => `${name}.onnx`);
  const names = [`ort/${site.runtime[runtime].binary}`, "weights.bin", ...graphs];
  const total = names.reduce((sum, name) => sum + site.sizes[name], 0);
  let loaded = 0;
  const report = (bytes) => {
    loaded += bytes;
    postMessage({ kind: "progress", loaded, total });
  };
  const files = await Promise.all(names.map((name) => download(name, report)));
  return Object.fromEntries(names.map((name, i) => [name, files[i]]));
}

async function openRuns(ort, site, files, provider) {
  const opened = {};
  for (const [name, about] of Object.entries(site.runs)) {
    const session = await ort.InferenceSession.create(files[`${name}.onnx`], {
      executionProviders: [provider],
      externalData: [{ path: "weights.bin", data: files["weights.bin"] }],
      logSeverityLevel: 3,
    });
    opened[name] = new Run(ort, session, site, about);
  }
  return opened;
}

// How far the images of two providers are apart, at the worst.
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

// The runs on the graphics processor where it computes what WebAssembly computes, or there.
async function checked(ort, site, files) {
  const safe = await openRuns(ort, site, files, "wasm");
  try {
    const fast = await openRuns(ort, site, files, "webgpu");
    const error = await apart(fast, safe);
    if (error <= SAME_IMAGE) {
      return [fast, `WebGPU, checked: images as WebAssembly's to ${error.toExponential(0)}`];
    }
    return [safe, `WebAssembly: WebGPU's images are ${error.toPrecision(2)} off here`];
  } catch (error) {
    return [safe, `WebAssembly: WebGPU does not run here (${error.message})`];
  }
}

async function load({ provider }) {
  const site = await (await fetch(here("runs.json"))).json();
  const ort = await import(here(`ort/${site.runtime[provider].module}`));
  const files = await downloadAll(site, provider);
  const threads = self.crossOriginIsolated
    ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = here("ort/");
  ort.env.wasm.wasmBinary = files[`ort/${site.runtime[provider].binary}`].buffer;
  ort.env.logLevel = "error";
  let told = `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  if (provider === "wasm") runs = await openRuns(ort, site, files, "wasm");
  else [runs, told] = await checked(ort, site, files);
  // The first call of a session allocates: not what the seconds should tell.
  for (const run of Object.values(runs)) await run.sample(gaussian(0, SIDE * SIDE), 0, 1).next();
  postMessage({ kind: "ready", told });
}

async function sample({ noise, label, guidance }) {
  for (const [name, run] of Object.entries(runs)) {
    for await (const step of run.sample(noise, label, guidance)) {
      postMessage({ kind: "step", name, ...step });
    }
  }
  postMessage({ kind: "done" });
}

const JOBS = { load, sample };

onmessage = async ({ data }) => {
  try {
    await JOBS[data.kind](data);
  } catch (error) {
    postMessage({ kind: "failed", message: error.message ?? String(error) });
  }
};
