// What onnxruntime loads: RegisterCustomOps gives a session the operators of the domain "medssm".
//
// The kernels' threads are as many as the session's configuration entry "medssm.threads" says, as many as the processor has without one.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "ops.h"

#define MEDSSM_VISIBLE extern "C" __attribute__((visibility("default")))

namespace medssm::ort {
namespace {

constexpr const char* kDomain = "medssm";

// What onnxruntime calls an op, first so that a pointer to it is a pointer to this.
struct Registered : CustomOp {
  const Op* op;
  int64_t threads;
};

const Registered& registered(const CustomOp* op) { return *static_cast<const Registered*>(op); }

struct Node {
  Api api;
  const Op* op;
  Attributes attributes;
};

// Runs what may throw; the status is null where it does not.
template <class Body> Status* status_of(const Api& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failed& failed) { return failed.status; } catch (const std::exception& error) {
    return api.status((std::string("medssm: ") + error.what()).c_str());
  } catch (...) { return api.status("medssm: an unknown exception"); }
}

Status* create(const CustomOp* self, const void* table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  return status_of(api, [&] {
    Library::get();  // a library that does not load is said when a session is made
    *kernel = new Node{api, registered(self).op, Attributes(api, info, registered(self).threads)};
  });
}

Status* compute(void* kernel, KernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  return status_of(node.api, [&] { node.op->run(Call(node.api, context, node.attributes, node.op->inputs.size())); });
}

Registered make(const Op& op, int64_t threads) {
  Registered made{};
  made.op = &op, made.threads = threads, made.version = kApiVersion;
  made.name = [](const CustomOp* self) { return registered(self).op->name; };
  made.provider = [](const CustomOp*) { return static_cast<const char*>(nullptr); };
  made.input_count = [](const CustomOp* self) { return registered(self).op->inputs.size(); };
  made.output_count = [](const CustomOp*) { return size_t{1}; };
  made.input_type = made.output_type = [](const CustomOp*, size_t) { return kFloat; };
  made.input_kind = [](const CustomOp* self, size_t i) { return registered(self).op->inputs[i] == '?' ? kOptional : kRequired; };
  made.output_kind = [](const CustomOp*, size_t) { return kRequired; };
  made.input_memory = [](const CustomOp*, size_t) { return kDefaultMemory; };
  made.create_kernel_v2 = create;
  made.compute_v2 = compute;
  made.destroy_kernel = [](void* kernel) { delete static_cast<Node*>(kernel); };
  return made;
}

// The domain for a number of threads. Sessions that share it may outlive each other, so it stays until the process ends.
Domain* domain(const Api& api, int64_t threads) {
  static std::mutex mutex;
  static std::map<int64_t, Domain*> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& found = domains[threads];
  if (!found) {
    Domain* made = api.domain(kDomain);
    for (const Op& op : ops()) api.add(made, new Registered(make(op, threads)));
    found = made;
  }
  return found;
}

int64_t threads_of(const Api& api, const SessionOptions* options) {
  const int64_t wanted = std::atoll(api.config(options, "medssm.threads").c_str());
  return wanted > 0 ? wanted : std::max<int64_t>(1, std::thread::hardware_concurrency());
}

}  // namespace
}  // namespace medssm::ort

MEDSSM_VISIBLE const char* medssm_onnx_version() { return MEDSSM_VERSION; }

MEDSSM_VISIBLE medssm::ort::Status* RegisterCustomOps(medssm::ort::SessionOptions* options, const medssm::ort::ApiBase* base) {
  using namespace medssm::ort;
  const void* table = base->get_api(kApiVersion);
  if (!table) return Api(base->get_api(1)).status("medssm: the custom operators need onnxruntime 1.16 or later");
  const Api api(table);
  return status_of(api, [&] { api.add(options, domain(api, threads_of(api, options))); });
}
