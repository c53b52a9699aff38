// A gated recurrence of a matrix S, computed for blocks of four tokens. Each lane has one column. Coefficients over the rows are broadcast.
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

  // The memory that a state with `rows` rows needs.
  static int64_t size(int64_t rows) { return rows * kRow + 2 * panel_size(rows); }

  State(int64_t rows, Workspace<T>& memory) :
      rows_(rows), state_(memory.allocate(rows * kRow)), panel_(memory.allocate(2 * panel_size(rows))), earlier_(panel_ + panel_size(rows)) {
    for (int64_t i = 0; i < 2 * panel_size(rows); ++i) panel_[i] = T(0);
    clear();
  }

  // clear: sets the state to zero. set: reads row i, lane c from data[offset + i * row_stride + c * column_stride]; null data means zero.
  void clear() {
    for (int64_t i = 0; i < rows_ * kRow; ++i) state_[i] = T(0);
    for (int64_t i = 0; i < panel_size(rows_); ++i) earlier_[i] = T(0);  // pending zeros times NaN would be NaN
    clear_pending();
  }
  void set(const void* data, int64_t offset, int64_t row_stride, int64_t column_stride, int lanes) {
    clear();
    if (!data) return;
    const T* from = static_cast<const T*>(data) + offset;
    for (int64_t i = 0; i < rows_; ++i)
      for (int c = 0; c < lanes; ++c) state_[i * kRow + c] = from[i * row_stride + c * column_stride];
  }

  // The state after all updates, as rows of kRow lanes.
  const T* value() {
    sweep<false>({}, nullptr);
    clear_pending();
    return state_;
  }
  void get(void* data, int64_t offset, int64_t row_stride, int lanes) {
    const T* from = value();
    for (int64_t i = 0; i < rows_; ++i)
      for (int c = 0; c < lanes; ++c) (static_cast<T*>(data) + offset)[i * row_stride + c] = from[i * kRow + c];
  }
  int64_t size() const { return rows_ * kRow; }
  int64_t rows() const { return rows_; }

  // Packs the coefficients of a block. Computes their dot products, and the read-outs from the state before the block: read[r * kBlock + j].
  MEDSSM_INLINE void read_block(const T* const* const (&coefficients)[kSlots], const Prefetch& prefetch, T* products, L* read) {
    read_packed([&](T* panel) { pack<T, kSlots, kUpdates - 1, kSlots - kReads, 0, kSlots - 1>(coefficients, rows_, panel, products); }, prefetch,
                read);
  }

  // The same, where pack_panel(panel) packs the coefficients.
  template <class Pack> MEDSSM_INLINE void read_packed(const Pack& pack_panel, const Prefetch& prefetch, L* read) {
    pack_panel(panel_);
    sweep<true>(prefetch, read);
    std::swap(panel_, earlier_);
  }

  // Stores the updates of the block, which the next sweep applies. x: of update u of token j, times the decays of the tokens after it. factor: the
  // decay of the state over the whole block.
  MEDSSM_INLINE void update(int u, int j, const L& x) { pending_[u * kBlock + j] = x; }
  using Factor = std::conditional_t<kDecay == Decay::kLanes, L, T>;
  MEDSSM_INLINE void decay(const Factor& factor) { decay_ = factor; }

 private:
  static int64_t panel_size(int64_t rows) { return round_up(rows, kLanes<T>) * (kWidth + (kDecay == Decay::kRows)); }
  T* decays_of_rows(T* panel) const { return panel + round_up(rows_, kLanes<T>) * kWidth; }
  void clear_pending() {
    if constexpr (kDecay == Decay::kLanes)
      decay_ = L::all(T(1));
    else
      decay_ = T(1);
    if constexpr (kDecay == Decay::kRows)
      for (int64_t i = 0; i < rows_; ++i) decays_of_rows(earlier_)[i] = T(1);
    for (L& x : pending_) x = L{};
  }

  template <bool kRead> MEDSSM_INLINE void sweep(const Prefetch& prefetch, L* read) {
    if constexpr (kDecay == Decay::kWhole)
      decay_ == T(1) ? sweep_rows<kRead, false>(prefetch, read) : sweep_rows<kRead, true>(prefetch, read);
    else
      sweep_rows<kRead, true>(prefetch, read);
  }

  template <bool kRead, bool kDecays> __attribute__((noinline)) void sweep_rows(const Prefetch& prefetch, L* read) {
    L x[kUpdates * kBlock], sum[kReads * kBlock] = {}, factor;
#pragma GCC unroll 16
    for (int j = 0; j < kUpdates * kBlock; ++j) x[j] = pending_[j];
    if constexpr (kDecay == Decay::kLanes)
      factor = decay_;
    else
      factor = L::all(decay_);
    const T* const of_rows = decays_of_rows(earlier_);
    const T *c = earlier_, *r = panel_ + (kSlots - kReads) * kBlock;
    T* s = state_;
    for (int64_t i = 0; i < rows_; ++i, c += kWidth, r += kWidth, s += kRow) {
      prefetch.request(2 * i);
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

  const int64_t rows_;
  T* const state_;
  T *panel_, *earlier_;
  L pending_[kUpdates * kBlock];
  Factor decay_;
};

}  // namespace
}  // namespace medssm
