// Segments a raw volume by a network that `medssm export onnx` wrote, with ONNX Runtime's C interface and nothing else (Linux, macOS).
//
//   segment MODEL.onnx VOLUME.raw X Y Z LABELS.raw [libmedssm_onnx.so]
//
// VOLUME.raw holds X * Y * Z float32 numbers, z fastest: one channel along RAS axes at the network's spacing, as it comes from the scanner.
// LABELS.raw gets as many int32 numbers, the values of the classes. The library of medssm's operators is needed where the file says so
// ("custom_ops"). As medssm predict it scales the intensities and averages overlapping windows with gaussian weights. For brevity it takes 3D
// networks of one channel with classes, and leaves resampling, mirroring, padding such as -3024 and post-processing to the caller.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

using Index = std::array<int64_t, 3>;

static const OrtApi* api = nullptr;

static void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string said = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(said);
}

// The text of an entry of a JSON object, from behind its colon on. Enough for what medssm writes; a program of your own may use a JSON library.
static std::string entry(const std::string& json, const std::string& key) {
  const size_t at = json.find("\"" + key + "\": ");
  if (at == std::string::npos) throw std::runtime_error("metadata: no entry " + key);
  return json.substr(at + key.size() + 4);
}

// The numbers of a list, of a flat object, or a single one, at the beginning of `json`.
static std::vector<double> numbers(const std::string& json) {
  std::vector<double> found;
  int depth = 0;
  for (size_t i = 0; i < json.size();) {
    const char c = json[i];
    if (c == '"') {  // a name: to its closing quote
      for (++i; i < json.size() && json[i] != '"'; ++i) i += json[i] == '\\';
      ++i;
    } else if (std::isdigit(static_cast<unsigned char>(c)) || c == '-') {
      char* end = nullptr;
      found.push_back(std::strtod(json.c_str() + i, &end));
      i = static_cast<size_t>(end - json.c_str());
      if (depth == 0) break;
    } else {
      depth += (c == '[' || c == '{') - (c == ']' || c == '}');
      ++i;
      if (depth == 0) break;
    }
  }
  return found;
}

struct Settings {
  Index patch;
  double overlap;
  std::vector<double> values;  // of the classes
  std::string scheme;
  double low, high, mean, deviation;
};

static Settings settings_of(const std::string& json) {
  if (numbers(entry(json, "schema")).at(0) != 1) throw std::runtime_error("metadata: expected the schema 1");
  const std::vector<double> patch = numbers(entry(json, "patch"));
  const std::string channels = entry(json, "channels"), first = channels.substr(0, channels.find('}'));
  if (patch.size() != 3 || channels.compare(first.size(), 2, "}]") != 0 || entry(json, "regions").compare(0, 4, "null") != 0)
    throw std::runtime_error("expected a 3D network of one channel, with classes");
  const std::string scheme = entry(first, "scheme");
  Settings found{{}, numbers(entry(json, "overlap")).at(0), numbers(entry(json, "classes")), scheme.substr(1, scheme.find('"', 1) - 1), 0, 0, 0, 1};
  std::copy(patch.begin(), patch.end(), found.patch.begin());
  found.low = -std::numeric_limits<double>::infinity(), found.high = -found.low;
  if (found.scheme == "ct" || found.scheme == "picture") {
    found.low = numbers(entry(first, "low")).at(0), found.high = numbers(entry(first, "high")).at(0);
    found.mean = numbers(entry(first, "mean")).at(0), found.deviation = numbers(entry(first, "deviation")).at(0);
  }
  return found;
}

static void scale(std::vector<float>& volume, Settings& how) {
  if (how.scheme == "zscore") {  // by the mean and the deviation of all voxels that are not zero
    double sum = 0, squares = 0, count = 0;
    for (const float value : volume) sum += value, count += value != 0;
    how.mean = count > 0 ? sum / count : 0;
    for (const float value : volume) squares += value != 0 ? (value - how.mean) * (value - how.mean) : 0;
    how.deviation = squares > 0 ? std::sqrt(squares / count) : 1;
  }
  for (float& value : volume) {
    const float kept = std::clamp(value, static_cast<float>(how.low), static_cast<float>(how.high));
    value = (kept - static_cast<float>(how.mean)) / static_cast<float>(how.deviation);
  }
}

// Where windows start along an axis; the last one ends with the volume.
static std::vector<int64_t> starts(int64_t size, int64_t patch, double overlap) {
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(patch) * (1 - overlap))),
                last = std::max<int64_t>(0, size - patch);
  std::vector<int64_t> found;
  for (int64_t start = 0; start < last; start += step) found.push_back(start);
  found.push_back(last);
  return found;
}

static std::vector<float> gaussian(const Index& patch) {
  std::vector<float> weights(1, 1.0F);
  for (const int64_t size : patch) {
    std::vector<float> grown;
    for (const float weight : weights)
      for (int64_t i = 0; i < size; ++i) {
        const double x = static_cast<double>(i) - static_cast<double>(size - 1) / 2, sigma = static_cast<double>(size) / 8;
        grown.push_back(weight * static_cast<float>(std::exp(-x * x / (2 * sigma * sigma))));
      }
    weights = grown;
  }
  const float smallest = std::max(*std::min_element(weights.begin(), weights.end()), 1e-3F);
  for (float& weight : weights) weight = std::max(weight, smallest);
  return weights;
}

// An exported network: a window (1, 1, *patch) -> its logits (1, classes, *patch).
class Network {
 public:
  Network(const char* path, const char* operators) {
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "segment", &environment_));
    OrtSessionOptions* options = nullptr;
    check(api->CreateSessionOptions(&options));
    if (operators != nullptr) check(api->RegisterCustomOpsLibrary_V2(options, operators));
    check(api->CreateSession(environment_, path, options, &session_));
    api->ReleaseSessionOptions(options);
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }

  std::string metadata() const {
    OrtModelMetadata* table = nullptr;
    OrtAllocator* allocator = nullptr;
    char* text = nullptr;
    check(api->SessionGetModelMetadata(session_, &table));
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    check(api->ModelMetadataLookupCustomMetadataMap(table, allocator, "medssm", &text));
    api->ReleaseModelMetadata(table);
    if (text == nullptr) throw std::runtime_error("not a file of medssm export");
    const std::string found = text;
    check(api->AllocatorFree(allocator, text));
    return found;
  }

  std::vector<float> run(std::vector<float>& window, const Index& patch, size_t classes) const {
    const char *input = "image", *output = "logits";
    const std::array<int64_t, 5> shape{1, 1, patch[0], patch[1], patch[2]};
    OrtValue *image = nullptr, *logits = nullptr;
    check(api->CreateTensorWithDataAsOrtValue(memory_, window.data(), window.size() * sizeof(float), shape.data(), shape.size(),
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &image));
    check(api->Run(session_, nullptr, &input, &image, 1, &output, 1, &logits));
    float* data = nullptr;
    check(api->GetTensorMutableData(logits, reinterpret_cast<void**>(&data)));
    const std::vector<float> found(data, data + classes * window.size());
    api->ReleaseValue(logits);
    api->ReleaseValue(image);
    return found;
  }

 private:  // released by the end of the process
  OrtEnv* environment_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
};

static std::vector<int32_t> segment(const Network& network, const std::vector<float>& volume, const Index& size, const Settings& how) {
  const size_t classes = how.values.size(), voxels = volume.size();
  const std::vector<float> weights = gaussian(how.patch);
  const float margin = *std::min_element(volume.begin(), volume.end());  // around a volume that is smaller than a window
  std::vector<float> sums(classes * voxels), window(weights.size());
  Index before{};
  for (size_t axis = 0; axis < 3; ++axis) before[axis] = std::max<int64_t>(0, how.patch[axis] - size[axis]) / 2;

  for (const int64_t x0 : starts(size[0], how.patch[0], how.overlap))
    for (const int64_t y0 : starts(size[1], how.patch[1], how.overlap))
      for (const int64_t z0 : starts(size[2], how.patch[2], how.overlap)) {
        std::vector<int64_t> places(window.size(), -1);  // of each voxel of the window in the volume; -1 in the margin
        size_t i = 0;
        for (int64_t x = x0 - before[0]; x < x0 - before[0] + how.patch[0]; ++x)
          for (int64_t y = y0 - before[1]; y < y0 - before[1] + how.patch[1]; ++y)
            for (int64_t z = z0 - before[2]; z < z0 - before[2] + how.patch[2]; ++z, ++i) {
              if (x >= 0 && x < size[0] && y >= 0 && y < size[1] && z >= 0 && z < size[2]) places[i] = (x * size[1] + y) * size[2] + z;
              window[i] = places[i] < 0 ? margin : volume[static_cast<size_t>(places[i])];
            }
        const std::vector<float> logits = network.run(window, how.patch, classes);
        for (i = 0; i < window.size(); ++i) {
          if (places[i] < 0) continue;
          float largest = logits[i], total = 0;
          for (size_t c = 1; c < classes; ++c) largest = std::max(largest, logits[c * window.size() + i]);
          for (size_t c = 0; c < classes; ++c) total += std::exp(logits[c * window.size() + i] - largest);
          for (size_t c = 0; c < classes; ++c)
            sums[c * voxels + static_cast<size_t>(places[i])] += weights[i] * std::exp(logits[c * window.size() + i] - largest) / total;
        }
      }

  std::vector<int32_t> labels(voxels);
  for (size_t i = 0; i < voxels; ++i) {
    size_t best = 0;
    for (size_t c = 1; c < classes; ++c)
      if (sums[c * voxels + i] > sums[best * voxels + i]) best = c;
    labels[i] = static_cast<int32_t>(how.values[best]);
  }
  return labels;
}

static std::vector<float> read(const char* path, size_t count) {
  std::vector<float> found(count + 1);
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(path) + ": cannot be read");
  file.read(reinterpret_cast<char*>(found.data()), static_cast<std::streamsize>(found.size() * sizeof(float)));
  if (static_cast<size_t>(file.gcount()) != count * sizeof(float))
    throw std::runtime_error(std::string(path) + ": expected " + std::to_string(count) + " float32 numbers");
  found.resize(count);
  return found;
}

static void write(const char* path, const std::vector<int32_t>& labels) {
  const std::string partial = std::string(path) + ".partial";
  std::ofstream file(partial, std::ios::binary);
  file.write(reinterpret_cast<const char*>(labels.data()), static_cast<std::streamsize>(labels.size() * sizeof(int32_t)));
  file.close();
  if (!file || std::rename(partial.c_str(), path) != 0) throw std::runtime_error(std::string(path) + ": cannot be written");
}

int main(int count, char** words) {
  if (count != 7 && count != 8) {
    std::fprintf(stderr, "usage: segment MODEL.onnx VOLUME.raw X Y Z LABELS.raw [libmedssm_onnx.so]\n");
    return 2;
  }
  try {
    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) throw std::runtime_error(std::string("the header is newer than ONNX Runtime ") + OrtGetApiBase()->GetVersionString());
    Index size{};
    for (size_t axis = 0; axis < 3; ++axis)
      if ((size[axis] = std::atoll(words[3 + axis])) < 1) throw std::runtime_error("X Y Z: expected numbers of voxels");
    std::vector<float> volume = read(words[2], static_cast<size_t>(size[0] * size[1] * size[2]));
    const Network network(words[1], count == 8 ? words[7] : nullptr);
    Settings how = settings_of(network.metadata());
    scale(volume, how);
    write(words[6], segment(network, volume, size, how));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "segment: %s\n", error.what());
    return 2;
  }
  return 0;
}
