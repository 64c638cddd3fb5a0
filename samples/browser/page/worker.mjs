// Loads the runs and samples them, away from the page's own thread.

import { chosen } from "./check.mjs";
import { gaussian } from "./ddim.mjs";
import { Run, SIDE } from "./run.mjs";

const MAX_THREADS = 4;

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

// Whether there is a graphics processor; one that is played by the processor would be slower.
async function hasGraphics() {
  const adapter = await navigator.gpu?.requestAdapter();
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function load({ provider }) {
  const site = await (await fetch(here("runs.json"))).json();
  const runtime = provider === "webgpu" && await hasGraphics() ? "webgpu" : "wasm";
  const { module, binary } = site.runtime[runtime];
  const ort = await import(here(`ort/${module}`));
  const files = await downloadAll(site, runtime);
  const threads = self.crossOriginIsolated
    ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = here("ort/");
  ort.env.wasm.wasmBinary = files[`ort/${binary}`].buffer;
  ort.env.logLevel = "error";
  runs = await openRuns(ort, site, files, "wasm");
  let told = `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  if (runtime === "webgpu") {
    [runs, told] = await chosen(runs, () => openRuns(ort, site, files, "webgpu"));
  } else if (provider === "webgpu") told += "; the browser offers no graphics processor";
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
