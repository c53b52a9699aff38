// What forward and backward share: threads through the tasks, tasks through the tiles, and the sums over tasks.
#pragma once
#include "medssm/scratch.h"
#include "problem.h"
#include "tile.h"

namespace medssm {
namespace {

template <class T> void clear(T* data, int64_t count) { std::memset(data, 0, static_cast<std::size_t>(count) * sizeof(T)); }

// Scratch that begins with zeros: a tile's rows beyond its tokens are read and never used.
template <class T> class Tiles {
 public:
  explicit Tiles(int64_t count) : scratch_(count) { clear(scratch_.data(), count); }
  T* data() const { return scratch_.data(); }

 private:
  const Scratch<T> scratch_;
};

// body(task) for this thread's share of a side's tasks.
template <class Body> void each_task(const Cut& cut, const Team& team, const Body& body) {
  const Range mine = share(cut.tasks(), team);
  for (int64_t i = mine.begin; i < mine.end; ++i) body(cut[i]);
}
// body(begin, count) for each tile of a task.
template <class Body> void each_tile(const Task& task, const Body& body) {
  for (int64_t begin = task.begin; begin < task.end; begin += kTokens) body(begin, least(kTokens, task.end - begin));
}
// body(first, count) for each run of a task's heads of q whose tiles fit into the first cache.
template <class T, class Body> void each_run(const Plan<T>& plan, const Task& task, const Body& body) {
  const int64_t end = (task.first + task.count) * plan.per_group;
  for (int64_t first = task.first * plan.per_group; first < end; first += plan.block) body(first, least(plan.block, end - first));
}

// The dense sums of one image's group into padded ones; null: zeros.
template <class T> void pad(const Plan<T>& plan, int64_t item, const T* kv, const T* z, T* total) {
  clear(total, plan.sums);
  for (int64_t r = 0; kv && r < plan.dk; ++r)
    std::memcpy(total + r * plan.dv_padded, kv + (item * plan.dk + r) * plan.dv, static_cast<std::size_t>(plan.dv) * sizeof(T));
  if (z) std::memcpy(total + plan.dk_padded * plan.dv_padded, z + item * plan.dk, static_cast<std::size_t>(plan.dk) * sizeof(T));
}

// Adds the segments' sums of one image's group to `before`, in order: padded into `totals`, dense into kv and z.
template <class T>
void reduce(const Plan<T>& plan, const Problem& p, int64_t item, const T* parts, int64_t shares, const T* before_kv, const T* before_z, T* totals, T* kv,
            T* z) {
  T* total = totals + item * plan.sums;
  pad(plan, item, before_kv, before_z, total);
  const T* first = parts + (item / p.groups * shares * p.groups + item % p.groups) * plan.sums;
  for (int64_t i = 0; i < plan.sums; i += kLanes<T>) {
    Vec<T> sum = load<T>(total + i);
    for (int64_t s = 0; s < shares; ++s) sum += load<T>(first + s * p.groups * plan.sums + i);
    store(total + i, sum);
  }
  for (int64_t r = 0; r < plan.dk; ++r)
    std::memcpy(kv + (item * plan.dk + r) * plan.dv, total + r * plan.dv_padded, static_cast<std::size_t>(plan.dv) * sizeof(T));
  std::memcpy(z + item * plan.dk, total + plan.dk_padded * plan.dv_padded, static_cast<std::size_t>(plan.dk) * sizeof(T));
}

// Where a task sums its share for its group g.
template <class T> T* part(const Plan<T>& plan, const Problem& p, const Cut& cut, const Task& task, int64_t g, T* parts) {
  return parts + ((task.n * cut.shares() + task.share) * p.groups + g) * plan.sums;
}

// Of a tile's tokens: 1 / (q' . z + eps), or 1, and that times the scale.
template <class T> struct Weights {
  alignas(64) T inverse[kTokens], scaled[kTokens];

  Weights(const Plan<T>& plan, const Problem& p, const T* q, const T* z, int64_t count) {
    for (T& one : inverse) one = 1;
    if (p.normalize) {
      dot_rows(q, z, 0, plan.dk_padded, count, inverse);
      for (int64_t t = 0; t < kTokens; t += kLanes<T>) store(inverse + t, 1 / (load<T>(inverse + t) + static_cast<T>(p.eps)));
    }
    for (int64_t t = 0; t < kTokens; t += kLanes<T>) store(scaled + t, load<T>(inverse + t) * static_cast<T>(p.scale));
  }
};

// out_t = by_t sum_r a_t[r] rows[r] for one head's tokens, written where they lie; `by` null: ones.
template <class T>
void write_products(const Plan<T>& plan, const Problem& p, const Tokens& out, int64_t n, int64_t begin, int64_t count, int64_t head, const T* a, const T* rows,
                    const T* by) {
  with_storage(out.type, out.data, [&](auto* data) {
    const bool stream = streams<T>(data, p.batch * out.stride[0], plan.dv);
    data += n * out.stride[0] + begin * out.stride[1] + head * out.stride[2];
    apply(a, plan.dk_padded, rows, plan.dk, plan.dv_padded, count, [&](int64_t t, int64_t c, Vec<T> o) __attribute__((always_inline)) {
      write_part<T>(data + t * out.stride[1], c, plan.dv, by ? o * by[t] : o, stream);
    });
  });
}

}  // namespace
}  // namespace medssm
