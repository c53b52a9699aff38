// A faster path of linear attention over all tokens. A head's keys and values are one vector each, stored in the compute type and without rotation:
// 16 channels of float with AVX-512. Only f(k) and f(q) of one head's tile are copied to a buffer, because the products read single numbers of them.
// v is read from its tensor and o is written to its tensor.
//
// The heads of a tile are processed one after the other, so that memory is read in order. During the products of one tile, the rows of the next tile
// are prefetched.
#pragma once
#include "tasks.h"

namespace medssm {
namespace {

// Whether this path can be used. The sums must have no padding.
template <class T> bool is_direct(const Problem& p) {
  constexpr int64_t kType = sizeof(T) == 4 ? kFloat32 : kFloat64;
  const bool as_stored = p.q.type == kType && p.k.type == kType && p.v.type == kType;
  return as_stored && padded_width<T>(kLanes<T>) == kLanes<T> && p.dk == kLanes<T> && p.dv == kLanes<T> && !p.cos.data;
}

// The rows of a tensor for one head of batch element n.
template <class T> T* head_rows(const Tokens& x, int64_t n, int64_t head) { return static_cast<T*>(x.data) + n * x.stride[0] + head * x.stride[2]; }

// f of a head's rows, stored without gaps. Prefetches the same rows of the next tile into the second-level cache.
template <int64_t kMap, class T> MEDSSM_INLINE void feature_rows(const T* x, int64_t stride, int64_t count, T* rows) {
  for (int64_t t = 0; t < count; ++t, x += stride) {
    __builtin_prefetch(x + kTokens * stride, 0, 2);
    store(rows + t * kLanes<T>, feature<kMap, T>(load<T>(x)));
  }
}

// Adds a task's f(k) v^T and f(k) to its sums.
template <int64_t kMap, class T> void direct_keys(const Plan<T>& plan, const Problem& p, const Task& task, T* parts) {
  constexpr int W = kLanes<T>;
  alignas(64) T rows[kTokens * W];
  each_tile(task, [&](const Tile& tile) {
    for (int64_t g = task.first; g < task.first + task.count; ++g) {
      const int64_t stride = p.v.stride[1];
      const T* v = head_rows<const T>(p.v, task.n, g) + tile.token(0) * stride;
      T* sums = part(plan, p, plan.k, task, g, parts);
      feature_rows<kMap>(head_rows<const T>(p.k, task.n, g) + tile.token(0) * p.k.stride[1], p.k.stride[1], tile.count, rows);
      add_rows<T>(rows, nullptr, W, tile.count, sums + W * W);
      for (int64_t t = 0; t < tile.count; ++t) __builtin_prefetch(v + (kTokens + t) * stride, 0, 2);
      add_products(rows, W, v, stride, W, tile.count, sums);
    }
  });
}

// Writes a task's o.
template <int64_t kMap, class T> void direct_queries(const Plan<T>& plan, const Problem& p, const Tokens& out, const Task& task, const T* totals) {
  constexpr int W = kLanes<T>;
  alignas(64) T rows[kTokens * W] = {};
  each_tile(task, [&](const Tile& tile) {
    for (int64_t head = task.first * plan.per_group; head < (task.first + task.count) * plan.per_group; ++head) {
      const T* kv = totals + (task.n * p.groups + head / plan.per_group) * plan.sums;
      feature_rows<kMap>(head_rows<const T>(p.q, task.n, head) + tile.token(0) * p.q.stride[1], p.q.stride[1], tile.count, rows);
      Weights<T> weights;
      if (p.normalize) dot_rows(rows, kv + W * W, 0, W, tile.count, weights.inverse);
      weights.invert(p);
      write_rows<T>(p, out, task.n, tile, head, W, [&](const auto& put) __attribute__((always_inline)) {
        apply(rows, W, kv, W, W, tile.count,
              [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) { put(t, c, o * weights.scaled[t]); });
      });
    }
  });
}

}  // namespace
}  // namespace medssm
