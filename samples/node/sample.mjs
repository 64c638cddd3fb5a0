// Sample the Fashion DiT in Node: node sample.mjs FOLDER, an artifact of the layout `sampler`.
// Writes the noise and the images as plain float32, in the folder where it is called.
import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";

const folder = process.argv[2];
const { noise, guidance } = JSON.parse(readFileSync(`${folder}/manifest.json`, "utf8")).sampler;

// Standard normal numbers, by Box and Muller.
const size = noise.shape.reduce((product, length) => product * length, 1);
const normal = Float32Array.from({ length: size }, () =>
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));

// Every class in turn, then no class (10) for as many: the two halves of a guided batch.
const images = noise.shape[0];
const labels = BigInt64Array.from({ length: 2 * images }, (_, i) =>
  BigInt(i < images ? i % 10 : 10));

const session = await ort.InferenceSession.create(`${folder}/model.onnx`);
const { latents } = await session.run({
  noise: new ort.Tensor("float32", normal, noise.shape),
  class_labels: new ort.Tensor("int64", labels, [2 * images]),
  guidance_scale: new ort.Tensor("float32", [guidance], []),
});
writeFileSync("noise.f32", normal);
writeFileSync("latents.f32", latents.data);
