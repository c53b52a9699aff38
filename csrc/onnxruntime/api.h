// The part of onnxruntime's C interface that custom operators need, declared here so that a build needs no file of onnxruntime.
//
// OrtApi is a table of functions that only grows: an entry keeps its position in every later version. The positions below are those of
// onnxruntime_c_api.h; tests/export/test_custom_ops.py runs every op through them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace medssm::ort {

constexpr uint32_t kApiVersion = 16;  // onnxruntime 1.16, the first with kernels that return a status

struct Status;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;

enum Entry {
  kCreateStatus = 0,
  kCreateDomain = 26,
  kAddOp = 27,
  kAddDomain = 28,
  kGetData = 51,
  kGetRank = 61,
  kGetShape = 62,
  kGetShapeInfo = 65,
  kGetFloat = 85,
  kGetInteger = 86,
  kGetString = 87,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kHasConfigEntry = 237,
  kGetConfigEntry = 238,
};

struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// OrtCustomOp of version 16.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);  // unused, as is compute: the later ones return a status
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);  // null: the CPU's
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  void* later[7];  // of later versions, null
};
constexpr int kFloat = 1, kRequired = 0, kOptional = 1, kDefaultMemory = 0, kFail = 1;

// A failed call's status, thrown. Whoever catches it returns it to onnxruntime.
struct Failed {
  Status* status;
};

struct Tensor {  // float32, dense; absent where an optional input is
  float* data = nullptr;
  std::vector<int64_t> shape;
  bool present = false;
  int64_t size(size_t from, size_t end) const {
    int64_t product = 1;
    for (size_t i = from; i < end; ++i) product *= shape[i];
    return product;
  }
  int64_t size() const { return size(0, shape.size()); }
};

class Api {
 public:
  explicit Api(const void* table) : functions_(static_cast<void* const*>(table)) {}

  Status* status(const char* text) const { return function<Status*(int, const char*)>(kCreateStatus)(kFail, text); }

  Domain* domain(const char* name) const {
    Domain* domain = nullptr;
    check(function<Status*(const char*, Domain**)>(kCreateDomain)(name, &domain));
    return domain;
  }
  void add(Domain* domain, const CustomOp* op) const { check(function<Status*(Domain*, const CustomOp*)>(kAddOp)(domain, op)); }
  void add(SessionOptions* options, Domain* domain) const { check(function<Status*(SessionOptions*, Domain*)>(kAddDomain)(options, domain)); }

  // An entry of the session's configuration, "" where it has none.
  std::string config(const SessionOptions* options, const char* key) const {
    int found = 0;
    check(function<Status*(const SessionOptions*, const char*, int*)>(kHasConfigEntry)(options, key, &found));
    char text[32] = "";
    size_t size = sizeof(text);
    if (found) check(function<Status*(const SessionOptions*, const char*, char*, size_t*)>(kGetConfigEntry)(options, key, text, &size));
    return text;
  }

  // An attribute of a node, `otherwise` where it has none.
  int64_t attribute(const KernelInfo* info, const char* name, int64_t otherwise) const {
    int64_t value = otherwise;
    return has(function<Status*(const KernelInfo*, const char*, int64_t*)>(kGetInteger)(info, name, &value)) ? value : otherwise;
  }
  double attribute(const KernelInfo* info, const char* name, double otherwise) const {
    float value = 0;
    return has(function<Status*(const KernelInfo*, const char*, float*)>(kGetFloat)(info, name, &value)) ? value : otherwise;
  }
  std::string attribute(const KernelInfo* info, const char* name) const {
    const auto get = function<Status*(const KernelInfo*, const char*, char*, size_t*)>(kGetString);
    size_t size = 0;
    if (!has(get(info, name, nullptr, &size))) return "";
    std::string text(size, '\0');
    check(get(info, name, text.data(), &size));
    text.resize(size - 1);  // without the terminating zero
    return text;
  }

  Tensor input(const KernelContext* context, size_t i) const {
    const Value* value = nullptr;
    check(function<Status*(const KernelContext*, size_t, const Value**)>(kGetInput)(context, i, &value));
    if (value == nullptr) return {};
    ShapeInfo* info = nullptr;
    check(function<Status*(const Value*, ShapeInfo**)>(kGetShapeInfo)(value, &info));
    Tensor tensor;
    size_t rank = 0;
    Status* failed = function<Status*(const ShapeInfo*, size_t*)>(kGetRank)(info, &rank);
    tensor.shape.resize(rank);
    if (!failed) failed = function<Status*(const ShapeInfo*, int64_t*, size_t)>(kGetShape)(info, tensor.shape.data(), rank);
    function<void(ShapeInfo*)>(kReleaseShapeInfo)(info);
    check(failed);
    tensor.data = data(const_cast<Value*>(value));
    tensor.present = true;
    return tensor;
  }

  Tensor output(KernelContext* context, std::vector<int64_t> shape) const {
    Value* value = nullptr;
    check(function<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(kGetOutput)(context, 0, shape.data(), shape.size(), &value));
    return {data(value), std::move(shape), true};
  }

 private:
  template <class F> F* function(Entry entry) const { return reinterpret_cast<F*>(functions_[entry]); }

  float* data(Value* value) const {
    void* found = nullptr;
    check(function<Status*(Value*, void**)>(kGetData)(value, &found));
    return static_cast<float*>(found);
  }

  bool has(Status* status) const {
    if (status) function<void(Status*)>(kReleaseStatus)(status);
    return status == nullptr;
  }

  static void check(Status* status) {
    if (status) throw Failed{status};
  }

  void* const* functions_;
};

}  // namespace medssm::ort
