// The controls, and what the worker's messages show.

import { gaussian } from "./ddim.mjs";
import { difference, SIDE } from "./run.mjs";

const $ = (selector, inside = document) => inside.querySelector(selector);
const site = await (await fetch("runs.json")).json();

// What is seen: by run { frames, seconds, macs }, the latents after every step among it.
export const seen = {};

let worker;

// Controls.

for (const [label, name] of site.classes.entries()) {
  const choice = document.createElement("label");
  const input = Object.assign(document.createElement("input"),
    { type: "radio", name: "class", value: label, checked: !label });
  choice.append(input, name);
  $("#classes").append(choice);
}
$("#guidance").value = site.guidance;
const showScale = () => { $("#scale").value = Number($("#guidance").value).toFixed(1); };
showScale();
$("#guidance").oninput = showScale;
$("#another").onclick = () => { $("#seed").value = Math.floor(Math.random() * 1e6); };
$("#provider").onchange = start;
$("#step").max = site.timesteps.length;
$("#step").oninput = () => showStep(Number($("#step").value));
$("#controls").onsubmit = (event) => {
  event.preventDefault();
  draw();
};

// The worker.

function say(text, failed = false) {
  $("#status span").textContent = text;
  $("#status").classList.toggle("failed", failed);
}

function start() {
  worker?.terminate();
  worker = new Worker("worker.mjs", { type: "module" });
  worker.onmessage = ({ data }) => SHOWN[data.kind](data);
  worker.onerror = (event) => SHOWN.failed({ message: event.message || "the worker does not start" });
  $("#draw").disabled = true;
  $("#progress").hidden = false;
  say("Loading");
  worker.postMessage({ kind: "load", provider: $("#provider").value });
}

function draw() {
  $("#draw").disabled = $("#step").disabled = true;
  $("#verdict").textContent = "";
  for (const name of Object.keys(site.runs)) {
    seen[name] = { frames: [], seconds: 0, macs: 0 };
    $(`#${name} .steps`).replaceChildren(...site.runs[name].modes.map((mode) =>
      Object.assign(document.createElement("i"),
        { className: mode === "REFRESH" ? "computed" : "forecast" })));
  }
  const noise = gaussian(Number($("#seed").value), SIDE * SIDE);
  Object.keys(site.runs).forEach((name) => paint(name, noise));
  const label = Number($("#classes :checked").value);
  worker.postMessage({ kind: "sample", noise, label, guidance: Number($("#guidance").value) });
}

const SHOWN = {
  progress({ loaded, total }) {
    $("#progress").value = loaded / total;
    const [have, all] = [loaded, total].map((bytes) => (bytes / 1e6).toFixed(1));
    say(loaded < total ? `Loading ${have} of ${all} MB` : "Opening the model");
  },
  ready({ told }) {
    $("#progress").hidden = true;
    say(told);
    $("#draw").disabled = false;
  },
  step({ name, latent, seconds }) {
    const run = seen[name];
    const step = run.frames.push(latent) - 1;
    run.seconds += seconds;
    run.macs += site.runs[name].macs[step];
    $(`#${name} .steps`).children[step].classList.add("done");
    $(`#${name} .seconds`).textContent = `${run.seconds.toFixed(2)} s`;
    $(`#${name} .macs`).textContent = `${(run.macs / 1e9).toFixed(2)} G`;
    paint(name, latent);
  },
  done() {
    const { full, searched } = seen;
    const share = (key) => `${Math.round((100 * searched[key]) / full[key])} %`;
    const apart = difference(searched.frames.at(-1), full.frames.at(-1));
    $("#verdict").textContent = `The plan took ${share("macs")} of the MACs and ${share("seconds")} `
      + `of the time; the images differ by ${(100 * apart).toFixed(1)} %.`;
    $("#draw").disabled = $("#step").disabled = false;
    $("#step").value = $("#shown").value = site.timesteps.length;
  },
  failed({ message }) {
    worker.onmessage = null; // downloads that go on have nothing to tell any more
    worker.terminate();
    $("#progress").hidden = true;
    say(message, true);
  },
};

// Images.

function showStep(step) {
  $("#shown").value = step;
  for (const [name, { frames }] of Object.entries(seen)) {
    paint(name, frames[step - 1]);
    [...$(`#${name} .steps`).children].forEach((cell, index) =>
      cell.classList.toggle("shown", index === step - 1 && step < frames.length));
  }
}

// -1 is black, 1 white.
function paint(name, latent) {
  const pixels = new ImageData(SIDE, SIDE);
  latent.forEach((value, i) => {
    const grey = (value + 1) * 127.5; // clamped and rounded by the array
    pixels.data.set([grey, grey, grey, 255], 4 * i);
  });
  $(`#${name} canvas`).getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
}

start();
