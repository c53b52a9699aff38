// The arguments of gated linear attention, and what its passes share: the operands and decays of a tile.
#pragma once
#include "medssm/math.h"
#include "medssm/matrix_scan.h"

namespace medssm {
namespace {

// The argument block that kernels/gated_linear_attention/native.py packs. Strides are in elements.
struct Problem {
  HeadTokens q, k, v, g;                      // q and k (b,l,h,dk), v (b,l,h,dv), g (b,l,h) or (b,l,h,dk)
  StateTensor initial;                        // (b,h,dk,dv); the data may be null
  const int64_t *index, *starts, *sequences;  // see medssm/walk.h
  int64_t start_count, reverse;
  int64_t batch, length, heads, keys, values;
  int64_t per_key, wide, threads;  // per_key: g has a value per key; wide: compute in double
  double scale;
};

// The same memory with rows and lanes exchanged.
MEDSSM_INLINE StateTensor transposed(const StateTensor& s) { return {s.data, s.type, s.batch, s.head, s.lane, s.row}; }

// The part of a pass (medssm/matrix_scan.h) that reads its operands: rows from q and k, lanes from v. v is multiplied by scale.
template <class T, class PassForm> class Reader {
 public:
  using Form = PassForm;

  // q, k: rows of `rows` elements; v: lanes.
  Reader(const Problem& p, int64_t rows, const HeadTokens& q, const HeadTokens& k, const HeadTokens& v, double scale) :
      p_(p),
      rows_(rows),
      q_(q),
      k_(k),
      v_(v),
      scale_(splat(static_cast<T>(scale))),
      scaled_(scale != 1),
      row_(round_up(padded_rows(rows), W)),
      memory_(kTileSteps * (2 * row_ + W + decay_size())) {
    q_rows_ = memory_.data();
    k_rows_ = q_rows_ + kTileSteps * row_;
    v_lanes_ = k_rows_ + kTileSteps * row_;
    decay_ = v_lanes_ + kTileSteps * W;
  }

  void begin_head(const Slot<T>&) const {}
  void begin_tile(const Slot<T>&, const Tile&) const {}
  void end_head(const Slot<T>&) const {}

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    const int64_t padded = padded_rows(rows_);
    return {rows_of<T>(q_, slot.batch, slot.head, 0, rows_, padded, tile, q_rows_),
            rows_of<T>(k_, slot.batch, slot.head, 0, rows_, padded, tile, k_rows_),
            {},
            decay_of_rows(slot, tile),
            tile.count};
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    in->v = rows_of<T>(v_, slot.batch, slot.head, block * W, slot.width(block), W, tile, v_lanes_);
    if (scaled_) {
      for (int64_t t = 0; t < tile.count; ++t) store(v_lanes_ + t * W, load<T>(in->v[t]) * scale_);
      in->v = {v_lanes_, W};
    }
    if constexpr (Form::kDecay == Decay::kLanes) {
      stage_rows<T>(p_.g, slot.batch, slot.head, block * W, slot.width(block), W, tile, decay_);
      exponentials(tile.count * W);
      in->decay = {decay_, W};
    }
  }

 protected:
  static constexpr int W = kLanes<T>;
  const Problem& p_;

 private:
  int64_t decay_size() const { return Form::kDecay == Decay::kRows ? row_ : Form::kDecay == Decay::kLanes ? W : 1; }

  View<T> decay_of_rows(const Slot<T>& slot, const Tile& tile) const {
    if constexpr (Form::kDecay == Decay::kWhole) {
      stage_numbers<T>(p_.g, slot.batch, slot.head, tile, decay_);
      exponentials(tile.count);
      return {decay_, 1};
    } else if constexpr (Form::kDecay == Decay::kRows) {
      stage_rows<T>(p_.g, slot.batch, slot.head, 0, rows_, row_, tile, decay_);
      exponentials(tile.count * row_);
      return {decay_, row_};
    } else {
      return {};
    }
  }

  void exponentials(int64_t count) const {
    for (int64_t i = 0; i < count; i += W) store(decay_ + i, exp<T>(load<T>(decay_ + i)));
  }

  const int64_t rows_;
  const HeadTokens q_, k_, v_;
  const Vec<T> scale_;
  const bool scaled_;
  const int64_t row_;  // elements per row of a buffer
  const Scratch<T> memory_;
  T *q_rows_, *k_rows_, *v_lanes_, *decay_;
};

}  // namespace
}  // namespace medssm
