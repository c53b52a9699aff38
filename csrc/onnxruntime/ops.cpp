#include "ops.h"

namespace medssm::ort {
namespace {

constexpr int64_t kFloat32 = 0;  // csrc/include/medssm/abi.h

// The spatial shape of tokens (b, *spatial, features) with `features` axes behind.
Shape spatial(const Tensor& t, size_t features) { return Shape(t.shape.begin() + 1, t.shape.end() - features); }

int64_t length(const Tensor& t, size_t features) { return t.size(1, t.shape.size() - features); }

int64_t last(const Tensor& t, size_t behind = 0) { return t.shape[t.shape.size() - 1 - behind]; }

// data, type and the strides of batch, token and of all features but the last, of dense tokens with `features` axes behind; zeros for an absent one.
void add_tokens(Arguments& arguments, const Tensor& t, size_t features) {
  const size_t rank = t.shape.size();
  arguments.add(t.data, kFloat32);
  if (!t.present) {
    for (size_t i = 0; i < features + 1; ++i) arguments.add(0);
    return;
  }
  const size_t token = rank - features;
  arguments.add(t.size(1, rank), t.size(token, rank));
  for (size_t i = token + 1; i < rank; ++i) arguments.add(t.size(i, rank));
}

// data, type and the strides of batch, head, row and lane of a dense state (b, h, p, n); zeros for an absent one.
void add_state(Arguments& arguments, const Tensor& t, bool rows_last = false) {
  arguments.add(t.data, kFloat32);
  if (!t.present) {
    arguments.add(0, 0, 0, 0);
    return;
  }
  const int64_t row = t.shape[3];
  arguments.add(t.size(1, 4), t.size(2, 4)).add(rows_last ? 1 : row, rows_last ? row : 1);
}

// -- scans --------------------------------------------------------------------------------------------------------------------------------------

struct Scan {  // of one order; pointers into tensors, strides in elements
  const float *u, *delta, *z, *B, *C, *A, *D, *bias, *proj, *initial;
  int64_t u_token, delta_token, rows_token, out_token;  // strides of the tokens of u, delta, of B and C, and of out; a batch's is length times it
  int64_t batch, length, channels, groups, state, rank;
  float* out;
  const float* earlier;
  double scale;
};

void add_rows(Arguments& arguments, const float* data, int64_t token, int64_t length) {
  arguments.add(data, kFloat32).add(data ? length * token : 0, data ? token : 0);
}

void run_scan(const Scan& s, const Walk& walk, bool reverse, const Attributes& attributes) {
  static const Kernel kernel("selective_scan_forward");
  Arguments a;
  add_rows(a, s.u, s.u_token, s.length);
  a.add(1);
  add_rows(a, s.delta, s.delta_token, s.length);
  a.add(1);
  add_rows(a, s.z, s.channels, s.length);
  a.add(s.z ? 1 : 0);
  add_rows(a, s.B, s.rows_token, s.length);
  a.add(s.state, 1);
  add_rows(a, s.C, s.rows_token, s.length);
  a.add(s.state, 1);
  a.add(s.A, s.D, s.bias, s.proj, s.initial).add_walk(walk, reverse);
  a.add(s.batch, s.length, s.channels, s.groups, s.state, s.rank).add(attributes.delta_softplus, 0, attributes.threads, s.scale);
  add_rows(a, s.out, s.out_token, s.length);
  a.add(s.earlier).add(nullptr, nullptr, 0);
  kernel(a);
}

void selective_scan(const Call& call) {
  const Tensor &u = call[0], &delta = call[1], &A = call[2], &B = call[3], &C = call[4], &D = call[5], &z = call[6], &bias = call[7], &proj = call[8];
  const Tensor out = call.output(u.shape);
  if (!out.size()) return;
  const int64_t channels = last(u), rows = last(B, 1) * last(B);
  Scan s;
  s.u = u.data, s.delta = delta.data, s.z = z.data, s.B = B.data, s.C = C.data, s.out = out.data, s.earlier = nullptr;
  s.A = A.data, s.D = D.data, s.bias = bias.data, s.proj = proj.data, s.initial = call[9].data;
  s.u_token = s.out_token = channels, s.delta_token = last(delta), s.rows_token = rows;
  s.batch = u.shape[0], s.length = length(u, 1), s.channels = channels, s.groups = last(B, 1), s.state = last(A);
  s.rank = proj.present ? last(delta) : 0, s.scale = 1;
  run_scan(s, *walk_of(call.attributes.order, spatial(u, 1)), call.attributes.reverse, call.attributes);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text)
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  return parts;
}

void selective_scan_nd(const Call& call) {
  const Tensor &x = call[0], &delta = call[1], &A = call[2], &B = call[3], &C = call[4], &D = call[5], &z = call[6], &bias = call[7], &proj = call[8];
  const int64_t k = A.shape[0], channels = A.shape[1], state = A.shape[2], rank = last(delta), groups = last(B, 1), rows = groups * state;
  const bool each = x.shape.size() == delta.shape.size(), stack = call.attributes.merge == "stack";  // each: x has tokens for every order
  const Shape space = spatial(delta, 2);
  Shape shape(x.shape.begin(), x.shape.begin() + 1 + space.size());
  if (stack) shape.push_back(k);
  shape.push_back(channels);
  const Tensor out = call.output(shape);
  if (!out.size()) return;
  const std::vector<std::string> orders = split(call.attributes.orders, ';');
  if (static_cast<int64_t>(orders.size()) != k) throw std::invalid_argument("selective_scan_nd: expected an order for each row of A");
  const auto row = [](const Tensor& t, int64_t i, int64_t size) { return t.present ? t.data + i * size : nullptr; };
  for (int64_t i = 0; i < k; ++i) {
    const bool last_one = stack || i == k - 1;
    Scan s;
    s.u = x.data + (each ? i * channels : 0), s.u_token = each ? k * channels : channels;
    s.delta = delta.data + i * rank, s.delta_token = k * rank;
    s.B = B.data + i * rows, s.C = C.data + i * rows, s.rows_token = k * rows;
    s.A = A.data + i * channels * state, s.D = row(D, i, channels), s.bias = row(bias, i, channels), s.proj = row(proj, i, channels * rank);
    s.z = last_one ? z.data : nullptr, s.initial = nullptr;
    s.batch = x.shape[0], s.length = length(delta, 2), s.channels = channels, s.groups = groups, s.state = state, s.rank = proj.present ? rank : 0;
    s.out = out.data + (stack ? i * channels : 0), s.out_token = stack ? k * channels : channels;
    s.earlier = stack || i == 0 ? nullptr : out.data;
    s.scale = last_one && call.attributes.merge == "mean" ? 1.0 / static_cast<double>(k) : 1.0;
    run_scan(s, *walk_of(orders[i], space), false, call.attributes);
  }
}

// -- convolutions -------------------------------------------------------------------------------------------------------------------------------

void causal_conv1d(const Call& call) {
  static const Kernel kernel("causal_conv1d_forward");
  const Tensor &x = call[0], &weight = call[1], &bias = call[2], &initial = call[3];
  const Tensor out = call.output(x.shape);
  if (!out.size()) return;
  const int64_t channels = last(x), width = last(weight), steps = length(x, 1);
  Arguments a;
  a.add(x.data, kFloat32, steps * channels, channels, x.shape[0], steps);
  a.add(weight.data, bias.data, kFloat32, kFloat32, channels, 1, 1, width).add(width, 0, 0, 1, bias.present ? 1 : 0);
  if (initial.present)
    a.add(initial.data, kFloat32, channels * (width - 1), width - 1, 1);
  else
    a.add(nullptr, 0, 0, 0, 0);
  a.add_walk(*walk_of(call.attributes.order, spatial(x, 1)), call.attributes.reverse);
  a.add(call.attributes.activation == "silu", 0, call.attributes.threads).add(out.data, nullptr);
  kernel(a);
}

void depthwise_conv(const Call& call) {
  static const Kernel kernel("depthwise_conv_forward");
  const Tensor &x = call[0], &weight = call[1], &bias = call[2];
  const Tensor out = call.output(x.shape);
  if (!out.size()) return;
  const Shape space = spatial(x, 1);
  const size_t missing = 3 - space.size();  // an image or a sequence is a volume with leading axes of size 1
  const auto each_axis = [&](Arguments& a, int64_t absent, auto&& value) {
    for (size_t i = 0; i < missing; ++i) a.add(absent);
    for (size_t i = 0; i < space.size(); ++i) a.add(value(i));
  };
  const auto stride = [](const Tensor& t) { return [&t](size_t i) { return t.size(i + 2, t.shape.size()); }; };
  Arguments a;
  a.add(x.data, kFloat32, x.size(1, x.shape.size()));
  each_axis(a, 0, stride(x));
  a.add(x.shape[0]);
  each_axis(a, 1, [&](size_t i) { return space[i]; });
  a.add(weight.data, bias.data, kFloat32, kFloat32, last(x));
  each_axis(a, 1, [&](size_t i) { return weight.shape[i + 1]; });
  a.add(weight.size(1, weight.shape.size()));
  each_axis(a, 0, stride(weight));
  a.add(bias.present ? 1 : 0, call.attributes.activation == "silu", 0, call.attributes.threads).add(out.data);
  kernel(a);
}

// -- matrix states ------------------------------------------------------------------------------------------------------------------------------

void ssd(const Call& call) {
  static const Kernel kernel("ssd_forward");
  const Tensor &x = call[0], &dt = call[1], &A = call[2], &B = call[3], &C = call[4], &D = call[5], &z = call[6], &bias = call[7];
  const Tensor out = call.output(x.shape);
  if (!out.size()) return;
  const int64_t heads = last(x, 1), size = last(x);
  std::vector<float> rows;  // D (h, p)
  for (int64_t i = 0; D.present && D.shape.size() == 1 && i < heads * size; ++i) rows.push_back(D.data[i / size]);
  Arguments a;
  for (const Tensor* t : {&x, &z, &B, &C}) add_tokens(a, *t, 2);
  add_tokens(a, dt, 1);
  a.add(1);  // the stride of its heads
  add_state(a, call[8], true);
  a.add(A.data, rows.empty() ? D.data : rows.data(), bias.data).add_walk(*walk_of(call.attributes.order, spatial(x, 2)), call.attributes.reverse);
  a.add(x.shape[0], length(x, 2), heads, size, last(B, 1), last(B), call.attributes.dt_softplus, 0, call.attributes.threads);
  a.add(call.attributes.low, call.attributes.high);
  add_tokens(a, out, 2);
  add_tokens(a, {}, 2);
  add_state(a, {});
  kernel(a);
}

// Of one rank with adjacent pairs, without initial states: medssm/export/program.py refuses the rest.
void ssd3(const Call& call) {
  static const Kernel kernel("ssd3_forward");
  const Tensor &x = call[0], &angles = call[6], &D = call[7], &z = call[8], &B_bias = call[9], &C_bias = call[10];
  Tensor B = call[3], C = call[4];
  for (size_t i = 11; i < 18; ++i)
    if (call[i].present) throw std::runtime_error("ssd3: several ranks and initial states have no kernel here");
  const Tensor out = call.output(x.shape);
  if (!out.size()) return;
  for (Tensor* t : {&B, &C}) t->shape.erase(t->shape.end() - 3);  // the axis of ranks
  const bool per_head = angles.shape.size() == x.shape.size();
  Arguments a;
  for (const Tensor* t : {&x, &z, static_cast<const Tensor*>(&B), static_cast<const Tensor*>(&C)}) add_tokens(a, *t, 2);
  for (size_t i : {1, 2, 5}) {  // dt, A, trap
    add_tokens(a, call[i], 1);
    a.add(1);  // the stride of its heads
  }
  add_tokens(a, angles, per_head ? 2 : 1);
  if (!per_head) a.add(0);
  add_state(a, {});
  a.add(nullptr, D.data, B_bias.data, C_bias.data).add_walk(*walk_of(call.attributes.order, spatial(x, 2)), call.attributes.reverse);
  a.add(x.shape[0], length(x, 2), last(x, 1), last(x), last(B, 1), last(B), last(angles), 0, call.attributes.threads);
  add_tokens(a, out, 2);
  add_tokens(a, {}, 2);
  add_state(a, {});
  a.add(nullptr);
  kernel(a);
}

void linear_attention(const Call& call) {
  static const Kernel whole("linear_attention_forward"), causal("linear_attention_causal_forward");
  const Tensor &q = call[0], &k = call[1], &v = call[2], &cos = call[3], &sin = call[4];
  const Attributes& given = call.attributes;
  Shape shape = q.shape;
  shape.back() = last(v);
  const Tensor out = call.output(shape);
  const int64_t batch = q.shape[0], groups = last(k, 1), keys = last(k), values = last(v);
  std::vector<float> sums(batch * groups * keys * (values + 1));  // kv, then z
  const int64_t map = given.feature_map == "relu" ? 1 : given.feature_map == "elu" ? 2 : 0;
  Arguments a;
  for (const Tensor* t : {&q, &k, &v}) add_tokens(a, *t, 2);
  for (const Tensor* t : {&cos, &sin}) a.add(t->data, t->present ? t->size(1, 3) : 0, t->present ? t->shape[2] : 0);
  a.add(batch, length(q, 2), length(k, 2), last(q, 1), groups, keys, values).add_walk(*walk_of(given.order, spatial(k, 2)), given.reverse);
  a.add(given.causal, map, given.normalize, 0, given.threads).add(given.scale, given.eps);
  add_tokens(a, out, 2);
  a.add(call[5].data, call[6].data, sums.data(), sums.data() + batch * groups * keys * values);
  (given.causal ? causal : whole)(a);
}

void gated_linear_attention(const Call& call) {
  static const Kernel kernel("gated_linear_attention_forward");
  const Tensor &q = call[0], &k = call[1], &v = call[2], &g = call[3];
  const Tensor out = call.output(v.shape);
  if (!out.size()) return;
  const bool per_key = g.shape.size() == q.shape.size();
  Arguments a;
  for (const Tensor* t : {&q, &k, &v}) add_tokens(a, *t, 2);
  add_tokens(a, g, per_key ? 2 : 1);
  if (!per_key) a.add(1);  // the stride of its heads
  add_state(a, call[4]);
  a.add_walk(*walk_of(call.attributes.order, spatial(q, 2)), call.attributes.reverse);
  a.add(q.shape[0], length(q, 2), last(q, 1), last(q), last(v), per_key, 0, call.attributes.threads, call.attributes.scale);
  add_tokens(a, out, 2);
  add_state(a, {});
  kernel(a);
}

// Tokens (b, *l, h, d) of that rank, or (b, *l, h).
void add_heads(Arguments& arguments, const Tensor& t, size_t rank) {
  const bool with_features = t.shape.size() == rank;
  add_tokens(arguments, t, with_features ? 2 : 1);
  if (!with_features) arguments.add(t.present ? 1 : 0);  // the stride of its heads
}

void delta_rule(const Call& call) {
  static const Kernel kernel("delta_rule_forward"), general("delta_rule_general_forward");
  const Tensor &q = call[0], &k = call[1], &v = call[2], &beta = call[3], &g = call[4], &erase = call[5], &erase_out = call[6], &write = call[7];
  const Tensor out = call.output(v.shape);
  if (!out.size()) return;
  const size_t rank = q.shape.size();
  const bool per_key = g.shape.size() == rank, first = call.attributes.erase_first;
  Arguments a;
  for (const Tensor* t : {&q, &k, &v, &beta, &g}) add_heads(a, *t, rank);
  a.add(call[8].data).add_walk(*walk_of(call.attributes.order, spatial(q, 2)), call.attributes.reverse);
  a.add(q.shape[0], length(q, 2), last(q, 1), last(q), last(v), 0, call.attributes.threads, call.attributes.scale);
  const bool is_general = per_key || erase.present || erase_out.present || write.present || first;
  if (is_general) {
    for (const Tensor* t : {erase.present ? &erase : &k, &erase_out, write.present ? &write : &beta}) add_heads(a, *t, rank);
    a.add(!erase.present, per_key, write.shape.size() == rank, first);
  }
  a.add(out.data, nullptr, nullptr);
  (is_general ? general : kernel)(a);
}

void bi_wkv(const Call& call) {
  static const Kernel kernel("bi_wkv_forward");
  const Tensor &w = call[0], &u = call[1], &k = call[2], &v = call[3];
  const Tensor out = call.output(v.shape);
  if (!out.size()) return;
  const int64_t steps = length(v, 1);
  const auto walk = walk_of(call.attributes.order, spatial(v, 1));
  const bool reverse = walk->reverse != call.attributes.reverse;
  Shape bounds = walk->starts;  // the first step of each segment in the walk as it is made, then the length
  if (!bounds.empty()) {
    bounds.push_back(steps);
    if (reverse) {
      std::reverse(bounds.begin(), bounds.end());
      for (int64_t& bound : bounds) bound = steps - bound;
    }
  }
  Arguments a;
  add_tokens(a, k, 1);
  add_tokens(a, v, 1);
  a.add(w.data, u.data, walk->index.empty() ? nullptr : walk->index.data(), bounds.empty() ? nullptr : bounds.data());
  a.add(bounds.empty() ? size_t{1} : bounds.size() - 1, reverse, v.shape[0], steps, last(v));
  a.add(call.attributes.mode == "upstream", 0, call.attributes.threads);
  add_tokens(a, out, 1);
  kernel(a);
}

}  // namespace

const std::vector<Op>& ops() {
  static const std::vector<Op> all{
      {"selective_scan", "+++++?????", selective_scan},
      {"selective_scan_nd", "+++++????", selective_scan_nd},
      {"causal_conv1d", "++??", causal_conv1d},
      {"depthwise_conv", "++?", depthwise_conv},
      {"ssd", "+++++????", ssd},
      {"ssd3", "+++++++???????????", ssd3},
      {"linear_attention", "+++????", linear_attention},
      {"gated_linear_attention", "++++?", gated_linear_attention},
      {"delta_rule", "++++?????", delta_rule},
      {"bi_wkv", "++++", bi_wkv},
  };
  return all;
}

}  // namespace medssm::ort
