// Sample the Fashion DiT in C++: sample FOLDER, an artifact of the layout `sampler`.
// Writes the noise and the images as plain float32, in the folder where it is called.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <fstream>
#include <random>
#include <string>
#include <vector>

static void write(const char* path, const float* values, size_t count) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values), count * sizeof(float));
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "sample");
  const std::string model = std::string(arguments[1]) + "/model.onnx";
  Ort::Session session(env, model.c_str(), Ort::SessionOptions{});

  // The first input is the noise: images, channels, height, width.
  const auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  const int64_t images = shape[0], both = 2 * images, scalar = 0;
  std::vector<float> noise(images * shape[1] * shape[2] * shape[3]);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (float& value : noise) value = normal(generator);

  // Every class in turn, then no class (10) for as many: the two halves of a guided batch.
  std::vector<int64_t> labels(both, 10);
  for (int64_t i = 0; i < images; ++i) labels[i] = i % 10;
  float guidance = 1.5f;

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const char* names[] = {"noise", "class_labels", "guidance_scale"};
  Ort::Value inputs[] = {
      Ort::Value::CreateTensor(memory, noise.data(), noise.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor(memory, labels.data(), labels.size(), &both, 1),
      Ort::Value::CreateTensor(memory, &guidance, 1, &scalar, 0)};
  const char* output = "latents";
  const auto results = session.Run(Ort::RunOptions{}, names, inputs, 3, &output, 1);

  write("noise.f32", noise.data(), noise.size());
  write("latents.f32", results[0].GetTensorData<float>(), noise.size());
}
