// The arguments of ssd, and what its passes share: the step sizes and decays of all tokens, and the operands of a tile.
#pragma once
#include "medssm/activation.h"
#include "medssm/heads.h"
#include "medssm/matrix_scan.h"

namespace medssm {
namespace {

// The argument block that kernels/ssd/native.py packs. Strides are in elements.
struct Problem {
  HeadTokens x, z, B, C, dt;                  // x (b,l,h,p), z the same or null, B and C (b,l,g,n), dt (b,l,h)
  StateTensor initial;                        // (b,h,n,p): rows are states, lanes are a head's channels; the data may be null
  const void *A, *D, *bias;                   // A (h), D (h,p), bias (h): dense, the compute type; D and bias may be null
  const int64_t *index, *starts, *sequences;  // see medssm/walk.h
  int64_t start_count, reverse;
  int64_t batch, length, heads, size, groups, states;
  int64_t softplus, wide, threads;  // wide: compute in double
  double low, high;                 // the limits of the step size
};

// The same memory with rows and lanes exchanged.
MEDSSM_INLINE StateTensor transposed(const StateTensor& s) { return {s.data, s.type, s.batch, s.head, s.lane, s.row}; }

// For every step of the walk: the step size s, the decay exp(s A), and the slope of s, its derivative by dt. Each is [b, h][step].
template <class T> class Steps {
 public:
  Steps(const Problem& p, const Walk& walk) :
      heads_(p.heads),
      length_(p.length),
      step_(p.batch * p.heads * p.length),
      decay_(p.batch * p.heads * p.length),
      slope_(p.batch * p.heads * p.length) {
    const int64_t items = p.batch * p.heads;
    parallel(useful_threads(p.threads, items, p.length), [&](const Team& team) {
      const Range mine = share(items, team);
      for (int64_t item = mine.begin; item < mine.end; ++item) compute(p, walk, item / p.heads, item % p.heads);
    });
  }

  // The numbers of one head, beginning at step `from` of the walk.
  const T* step(int64_t batch, int64_t head, int64_t from) const { return step_.data() + at(batch, head, from); }
  const T* decay(int64_t batch, int64_t head, int64_t from) const { return decay_.data() + at(batch, head, from); }
  const T* slope(int64_t batch, int64_t head, int64_t from) const { return slope_.data() + at(batch, head, from); }

 private:
  int64_t at(int64_t batch, int64_t head, int64_t from) const { return (batch * heads_ + head) * length_ + from; }

  void compute(const Problem& p, const Walk& walk, int64_t batch, int64_t head) const {
    constexpr int W = kLanes<T>;
    const Vec<T> A = splat(static_cast<const T*>(p.A)[head]), bias = splat(p.bias ? static_cast<const T*>(p.bias)[head] : T(0));
    const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
    T raw[kTileSteps];
    for (int64_t from = 0; from < length_;) {
      const Tile tile = walk.tile(from, length_);
      stage_numbers<T>(p.dt, batch, head, tile, raw);
      for (int64_t t = 0; t < tile.count; t += W, from += W) {
        const int lanes = static_cast<int>(least<int64_t>(W, tile.count - t));
        const Vec<T> r = load_part<T>(raw + t, lanes) + bias;
        Softplus<T> s{r, splat(T(1))};
        if (p.softplus) s = softplus_of<T>(r, exp_minus_abs<T>(r));
        const Vec<T> clamped = min(splat(high), max(splat(low), s.value));
        store_part(step_.data() + at(batch, head, from), clamped, lanes);
        store_part(decay_.data() + at(batch, head, from), exp<T>(clamped * A), lanes);
        store_part(slope_.data() + at(batch, head, from), select(clamped == s.value, s.slope, Vec<T>{}), lanes);
      }
      from = tile.from + tile.count;
    }
  }

  const int64_t heads_, length_;
  const Scratch<T> step_, decay_, slope_;
};

// A tensor that a pass reads. sharing: how many neighbouring heads read the same entry of its head axis.
struct Source {
  HeadTokens tokens;
  int64_t sharing;
};

// The part of a pass (medssm/matrix_scan.h) that reads its operands: rows from q and k, lanes from v. kStepped: v is multiplied by the step size.
template <class T, bool kBack, bool kStrict, bool kStepped> class Reader {
 public:
  using Form = medssm::Form<Decay::kWhole, kBack, kStrict>;

  Reader(const Problem& p, const Steps<T>& steps, int64_t rows, const Source& q, const Source& k, const Source& v) :
      p_(p), sharing_(p.heads / p.groups), steps_(steps), rows_(rows), q_(q), k_(k), v_(v), memory_(kTileSteps * (2 * padded_rows(rows) + W)) {}

  void begin_head(const Slot<T>&) const {}
  void begin_tile(const Slot<T>&, const Tile&) const {}
  void end_head(const Slot<T>&) const {}

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    T* const buffer = memory_.data() + kTileSteps * W;
    const int64_t padded = padded_rows(rows_);
    return {view(q_, slot, 0, rows_, padded, tile, buffer),
            view(k_, slot, 0, rows_, padded, tile, buffer + kTileSteps * padded),
            {},
            in_time(steps_.decay(slot.batch, slot.head, first(tile))),
            tile.count};
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    in->v = block_of(v_, slot, tile, block, memory_.data());
    if constexpr (kStepped) {
      const View<T> s = step(slot, tile);
      for (int64_t t = 0; t < tile.count; ++t) store(memory_.data() + t * W, load<T>(in->v[t]) * splat(*s[t]));
      in->v = {memory_.data(), W};
    }
  }

 protected:
  static constexpr int W = kLanes<T>;

  // One block of lanes of a tensor.
  View<T> block_of(const Source& x, const Slot<T>& slot, const Tile& tile, int64_t block, T* buffer) const {
    return view(x, slot, block * W, slot.width(block), W, tile, buffer);
  }
  // s of a tile's steps. A pass that goes through the walk backward reads them in reverse order.
  View<T> step(const Slot<T>& slot, const Tile& tile) const { return in_time(steps_.step(slot.batch, slot.head, first(tile))); }
  int64_t first(const Tile& tile) const { return kBack ? p_.length - 1 - tile.from : tile.from; }

  const Problem& p_;
  const int64_t sharing_;  // heads per group
  const Steps<T>& steps_;

 private:
  static View<T> in_time(const T* first) { return {first, kBack ? -1 : 1}; }
  View<T> view(const Source& x, const Slot<T>& slot, int64_t from, int64_t count, int64_t padded, const Tile& tile, T* buffer) const {
    return rows_of<T>(x.tokens, slot.batch, slot.head / x.sharing, from, count, padded, tile, buffer);
  }

  const int64_t rows_;
  const Source q_, k_, v_;
  const Scratch<T> memory_;
};

// D of a block of a head's channels; zeros without D.
template <class T> Vec<T> skip_of(const Problem& p, const Slot<T>& slot, int64_t block) {
  if (!p.D) return Vec<T>{};
  return load_part<T>(static_cast<const T*>(p.D) + slot.head * p.size + block * kLanes<T>, slot.width(block));
}

}  // namespace
}  // namespace medssm
