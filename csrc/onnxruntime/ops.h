// The operators of the domain "medssm": what of kernels/<op>/native.py a forward without gradients needs. Inputs are float32 and dense.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "api.h"
#include "kernels.h"
#include "orders.h"

namespace medssm::ort {

// What a node says beside its inputs. A node without an attribute has the value here.
struct Attributes {
  std::string order, orders, activation, merge, mode, feature_map;
  bool reverse = false, delta_softplus = false, dt_softplus = false, causal = false, normalize = false, erase_first = false;
  double scale = 1, eps = 0, low = 0, high = INFINITY;
  int64_t threads = 1;

  Attributes(const Api& api, const KernelInfo* info, int64_t threads) : threads(threads) {
    const auto text = [&](const char* name) { return api.attribute(info, name); };
    const auto flag = [&](const char* name) { return api.attribute(info, name, int64_t{0}) != 0; };
    const auto number = [&](const char* name, double otherwise) { return api.attribute(info, name, otherwise); };
    order = text("order"), orders = text("orders"), activation = text("activation");
    merge = text("merge"), mode = text("mode"), feature_map = text("feature_map");
    reverse = flag("reverse"), delta_softplus = flag("delta_softplus"), dt_softplus = flag("dt_softplus");
    causal = flag("causal"), normalize = flag("normalize"), erase_first = flag("erase_first");
    scale = number("scale", scale), eps = number("eps", eps), low = number("low", low), high = number("high", high);
  }
};

// One call of an op: its inputs in the order of medssm/ops/<op>.py, those that were not given absent, and its output.
class Call {
 public:
  Call(const Api& api, KernelContext* context, const Attributes& attributes, size_t inputs) : attributes(attributes), api_(api), context_(context) {
    for (size_t i = 0; i < inputs; ++i) inputs_.push_back(api.input(context, i));
  }
  const Tensor& operator[](size_t i) const { return inputs_[i]; }
  Tensor output(std::vector<int64_t> shape) const { return api_.output(context_, std::move(shape)); }

  const Attributes& attributes;

 private:
  const Api& api_;
  KernelContext* context_;
  std::vector<Tensor> inputs_;
};

struct Op {
  const char* name;
  std::string inputs;  // for each input '+', or '?' for one that may be absent
  void (*run)(const Call&);
};

const std::vector<Op>& ops();

}  // namespace medssm::ort
