// A gated recurrence of a matrix, four tokens at a time. Rows are read by broadcast coefficients, columns lie in the lanes.
//
// Each token adds kUpdates outer products c_t x_t^T (c over the rows, x over the columns) and takes kReads = 3 - kUpdates read-outs S^T r_t. One
// sweep over the rows applies the updates of the block before and sums the read-outs of the block at hand from the state before it, so that a row is
// loaded and stored once in four tokens; what the block's own tokens contribute to each other's read-outs follows from the products of their
// coefficients. Decays enter as products of the block's own factors, never as a quotient.
#pragma once
#include "panel.h"

namespace medssm {
namespace {

// kSlots coefficients a token: the first kUpdates are those of the updates, the last kReads those of the read-outs (they may overlap).
template <class T, int kVectors, int kSlots, int kUpdates> class State {
 public:
  static constexpr int kReads = 3 - kUpdates, kWidth = kSlots * kBlock, kRow = kVectors * kLanes<T>;
  using L = Lanes<T, kVectors>;

  // The memory that a state of so many rows takes.
  static int64_t size(int64_t rows) { return rows * kRow + 2 * panel_size(rows); }

  State(int64_t rows, Workspace<T>& memory) :
      rows_(rows), state_(memory.take(rows * kRow)), panel_(memory.take(2 * panel_size(rows))), earlier_(panel_ + panel_size(rows)) {
    for (int64_t i = 0; i < 2 * panel_size(rows); ++i) panel_[i] = T(0);
    clear();
  }

  // Zero, or row i from data + i * row_stride, lane c from there + c * column_stride.
  void clear() {
    for (int64_t i = 0; i < rows_ * kRow; ++i) state_[i] = T(0);
    settle();
  }
  void set(const void* data, int64_t offset, int64_t row_stride, int64_t column_stride, int lanes) {
    clear();
    if (!data) return;
    const T* from = static_cast<const T*>(data) + offset;
    for (int64_t i = 0; i < rows_; ++i)
      for (int c = 0; c < lanes; ++c) state_[i * kRow + c] = from[i * row_stride + c * column_stride];
  }

  // The state itself, all updates applied: rows of kRow lanes.
  const T* value() {
    sweep<false>({}, nullptr);
    settle();
    return state_;
  }
  void get(void* data, int64_t offset, int64_t row_stride, int lanes) {
    const T* from = value();
    for (int64_t i = 0; i < rows_; ++i)
      for (int c = 0; c < lanes; ++c) (static_cast<T*>(data) + offset)[i * row_stride + c] = from[i * kRow + c];
  }
  int64_t size() const { return rows_ * kRow; }

  // Takes the coefficients of a block: its products, and the read-outs of the state before it, read[r * kBlock + j].
  MEDSSM_INLINE void take(const T* const* const (&coefficients)[kSlots], const Ahead& ahead, T* products, L* read) {
    pack<T, kSlots, kUpdates - 1, kSlots - kReads, 0, kSlots - 1>(coefficients, rows_, panel_, products);
    sweep<true>(ahead, read);
    std::swap(panel_, earlier_);
  }

  // The block's updates, x[u * kBlock + j] with the decays of the tokens behind it, and its decay of the state before it.
  MEDSSM_INLINE void update(int u, int j, const L& x) { pending_[u * kBlock + j] = x; }
  MEDSSM_INLINE void decay(T factor) { decay_ = factor; }

 private:
  static int64_t panel_size(int64_t rows) { return round_up(rows, kLanes<T>) * kWidth; }
  void settle() {
    decay_ = T(1);
    for (L& x : pending_) x = L{};
  }

  template <bool kRead> MEDSSM_INLINE void sweep(const Ahead& ahead, L* read) {
    decay_ == T(1) ? rows<kRead, false>(ahead, read) : rows<kRead, true>(ahead, read);
  }

  template <bool kRead, bool kDecays> __attribute__((noinline)) void rows(const Ahead& ahead, L* read) {
    L x[kUpdates * kBlock], sum[kReads * kBlock] = {};
#pragma GCC unroll 16
    for (int j = 0; j < kUpdates * kBlock; ++j) x[j] = pending_[j];
    const Vec<T> factor = splat(decay_);
    const T *c = earlier_, *r = panel_ + (kSlots - kReads) * kBlock;
    T* s = state_;
    for (int64_t i = 0; i < rows_; ++i, c += kWidth, r += kWidth, s += kRow) {
      ahead.ask(2 * i);
      L row;
#pragma GCC unroll 2
      for (int l = 0; l < kVectors; ++l) {
        row.v[l] = load<T>(s + l * kLanes<T>);
        if (kDecays) row.v[l] *= factor;
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
  T decay_;
};

}  // namespace
}  // namespace medssm
