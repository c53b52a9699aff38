// A gated recurrence of a matrix S, computed for blocks of four tokens. Each lane has one column. Coefficients over the rows are broadcast. The parts
// of an item, each of kVectors vectors of lanes, are swept one after the other with the same packed coefficients.
//
// Each token adds kUpdates outer products c_t x_t^T (c over the rows, x over the columns) and computes kReads read-outs S^T r_t. One sweep over the
// rows applies the updates of the previous block, and sums the read-outs of the current block from the state before it. So a row is loaded and stored
// once per four tokens. The contributions of the block's tokens to each other's read-outs are computed from the dot products of their coefficients.
// Decays are products of the block's own factors, never a quotient, so strong decay is safe.
#pragma once
#include "panel.h"

namespace medssm {
namespace {

// The decay of the state over a block: one number, one per row (the panel has them behind its coefficients), or one per lane.
enum class Decay { kWhole, kRows, kLanes };

// A token has kSlots coefficient vectors: the first kUpdates are for the updates, the last kReads for the read-outs. They may overlap.
template <class T, int kVectors, int kSlots, int kUpdates, int kReads = 3 - kUpdates, Decay kDecay = Decay::kWhole> class State {
 public:
  static constexpr int kWidth = kSlots * kBlock, kRow = kVectors * kLanes<T>;
  using L = Lanes<T, kVectors>;

  // The memory that a state of so many rows and columns needs.
  static int64_t size(int64_t rows, int64_t columns) { return ceil_div(columns, kRow) * rows * kRow + 2 * panel_size(rows); }

  State(int64_t rows, const Item& item, Workspace<T>& memory) :
      rows_(rows),
      columns_(item.columns),
      parts_(ceil_div(item.columns, kRow)),
      state_(memory.allocate(parts_ * rows * kRow)),
      panel_(memory.allocate(2 * panel_size(rows))),
      earlier_(panel_ + panel_size(rows)) {
    for (int64_t i = 0; i < 2 * panel_size(rows); ++i) panel_[i] = T(0);
    clear();
  }

  // clear: sets the state to zero. set: reads row i, column c from data[offset + i * row_stride + c * column_stride]; null data means zero.
  void clear() {
    for (int64_t i = 0; i < size(); ++i) state_[i] = T(0);
    for (int64_t i = 0; i < panel_size(rows_); ++i) panel_[i] = T(0);  // pending zeros times NaN would be NaN
    clear_pending();
  }
  void set(const void* data, int64_t offset, int64_t row_stride, int64_t column_stride) {
    clear();
    if (!data) return;
    const T* from = static_cast<const T*>(data) + offset;
    each_element([&](int64_t i, int64_t c, T& s) { s = from[i * row_stride + c * column_stride]; });
  }

  // The state after all updates: for each part, rows of kRow lanes.
  const T* value() {
    for (int part = 0; part < parts_; ++part) sweep<false>(part, panel_, {}, nullptr);
    clear_pending();
    return state_;
  }
  void get(void* data, int64_t offset, int64_t row_stride) {
    value();
    each_element([&](int64_t i, int64_t c, const T& s) { (static_cast<T*>(data) + offset)[i * row_stride + c] = s; });
  }
  int64_t size() const { return parts_ * of_part(); }
  int64_t of_part() const { return rows_ * kRow; }
  int64_t rows() const { return rows_; }

  // Packs the coefficients of the next block and computes their dot products.
  MEDSSM_INLINE void pack_block(const T* const* const (&coefficients)[kSlots], T* products) {
    pack_with([&](T* panel) { pack<T, kSlots, kUpdates - 1, kSlots - kReads, 0, kSlots - 1>(coefficients, rows_, panel, products); });
  }

  // The same, where pack_panel(panel) packs the coefficients.
  template <class Pack> MEDSSM_INLINE void pack_with(const Pack& pack_panel) {
    std::swap(panel_, earlier_);
    pack_panel(panel_);
  }

  // The read-outs of a part from the state before the packed block: read[r * kBlock + j]. Applies the updates of the block before.
  MEDSSM_INLINE void read(int part, const Prefetch& prefetch, L* read) { sweep<true>(part, earlier_, prefetch, read); }

  // Stores the updates of the block, which the next sweep applies. x: of update u of token j, times the decays of the tokens after it. factor: the
  // decay of the state over the whole block.
  MEDSSM_INLINE void update(int part, int u, int j, const L& x) { pending_[part][u * kBlock + j] = x; }
  using Factor = std::conditional_t<kDecay == Decay::kLanes, L, T>;
  MEDSSM_INLINE void decay(int part, const Factor& factor) { decay_[part] = factor; }

 private:
  static constexpr int64_t kGroup = 8;  // rows of a sweep between two requests for cache lines

  // Calls f(row, column, element) for each element.
  template <class F> void each_element(const F& f) {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t c = 0; c < columns_; ++c) f(i, c, state_[c / kRow * of_part() + i * kRow + c % kRow]);
  }
  static int64_t panel_size(int64_t rows) { return round_up(rows, kLanes<T>) * (kWidth + (kDecay == Decay::kRows)); }
  template <class P> P* decays_of_rows(P* panel) const { return panel + round_up(rows_, kLanes<T>) * kWidth; }
  void clear_pending() {
    for (int part = 0; part < parts_; ++part) {
      if constexpr (kDecay == Decay::kLanes)
        decay_[part] = L::all(T(1));
      else
        decay_[part] = T(1);
      for (L& x : pending_[part]) x = L{};
    }
    if constexpr (kDecay == Decay::kRows)
      for (int64_t i = 0; i < rows_; ++i) decays_of_rows(panel_)[i] = T(1);
  }

  template <bool kRead> MEDSSM_INLINE void sweep(int part, const T* updates, const Prefetch& prefetch, L* read) {
    if constexpr (kDecay == Decay::kWhole)
      decay_[part] == T(1) ? sweep_rows<kRead, false>(part, updates, prefetch, read) : sweep_rows<kRead, true>(part, updates, prefetch, read);
    else
      sweep_rows<kRead, true>(part, updates, prefetch, read);
  }

  // updates: the panel with the coefficients of the pending updates.
  template <bool kRead, bool kDecays> __attribute__((noinline)) void sweep_rows(int part, const T* updates, const Prefetch& prefetch, L* read) {
    L x[kUpdates * kBlock], sum[kReads * kBlock] = {}, factor;
#pragma GCC unroll 16
    for (int j = 0; j < kUpdates * kBlock; ++j) x[j] = pending_[part][j];
    if constexpr (kDecay == Decay::kLanes)
      factor = decay_[part];
    else
      factor = L::all(decay_[part]);
    const T* const of_rows = decays_of_rows(updates);
    const T *c = updates, *r = panel_ + (kSlots - kReads) * kBlock;
    T* s = state_ + part * of_part();
    const int64_t groups = ceil_div(rows_, kGroup), lines = ceil_div(prefetch.count(), parts_ * groups);
    for (int64_t i = 0, line = part * groups * lines, end = 0; i < rows_; ++i, c += kWidth, r += kWidth, s += kRow) {
      if (i == end) {
        prefetch.request(line, line + lines);
        line += lines;
        end += kGroup;
      }
      L row;
      if constexpr (kDecay == Decay::kRows) factor = L::all(of_rows[i]);
#pragma GCC unroll 2
      for (int l = 0; l < kVectors; ++l) {
        row.v[l] = load<T>(s + l * kLanes<T>);
        if (kDecays) row.v[l] *= factor.v[l];
      }
#pragma GCC unroll 16
      for (int j = 0; j < kUpdates * kBlock; ++j)
#pragma GCC unroll 2
        for (int l = 0; l < kVectors; ++l) row.v[l] = fma(splat(c[j]), x[j].v[l], row.v[l]);
#pragma GCC unroll 2
      for (int l = 0; l < kVectors; ++l) store(s + l * kLanes<T>, row.v[l]);
      if (kRead)
#pragma GCC unroll 16
        for (int j = 0; j < kReads * kBlock; ++j)
#pragma GCC unroll 2
          for (int l = 0; l < kVectors; ++l) sum[j].v[l] = fma(splat(r[j]), row.v[l], sum[j].v[l]);
    }
    if (kRead)
#pragma GCC unroll 16
      for (int j = 0; j < kReads * kBlock; ++j) read[j] = sum[j];
  }

  const int64_t rows_, columns_, parts_;
  T* const state_;
  T *panel_, *earlier_;  // of the last packed block, and of the one before it
  L pending_[kMostParts][kUpdates * kBlock];
  Factor decay_[kMostParts];
};

}  // namespace
}  // namespace medssm
