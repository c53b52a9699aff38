// Mamba-3's recurrence, forward, on a CPU, as problem.h has it; out_t = y_t silu(z_t).
#include "problem.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  HeadOutput out, y;   // y: the compute type; may be null
  StateTensor final;   // the compute type; may be null
  double* angle_last;  // (b,h,a), in revolutions; may be null
};

template <class T> class Forward : public Reader<T, false> {
 public:
  Forward(const Arguments& a, const Steps<T>& steps) :
      Forward::Reader(a.problem, steps), a_(a), rows_(2 * kTileSteps * this->row()), memory_(kTileSteps * (4 * W + 1)) {}

  Operands<T> rows(const Slot<T>& slot, const Tile& tile) const {
    T *const q = rows_.data(), *const k = q + kTileSteps * this->row();
    this->turned_rows(slot, tile, q, k);
    const Operands<T> in{{q, this->row()}, {k, this->row()}, {}, this->decay(slot, tile), tile.count};
    own_products(in.q, in.k, slot.rows, tile.count, own());
    return in;
  }

  void lanes(const Slot<T>& slot, const Tile& tile, int64_t block, Operands<T>* in) const {
    const View<T> now = this->now(slot, tile), later = this->later(slot, tile), x = this->block_of(a_.problem.x, slot, tile, block, x_buffer());
    T* const v = memory_.data();
    for (int64_t t = 0; t < tile.count; ++t) store(v + t * W, load<T>(x[t]) * splat(*now[t] + *later[t]));
    in->v = {v, W};
  }

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>&, const T* o) const {
    const Problem& p = a_.problem;
    const int width = slot.width(block);
    const T D = skip_of(p, slot);
    const View<T> now = this->now(slot, tile), x = this->block_of(p.x, slot, tile, block, x_buffer());
    T *const y = x_buffer() + kTileSteps * W, *const z_buffer = y + kTileSteps * W;
    for (int64_t t = 0; t < tile.count; ++t) store(y + t * W, fma(splat(*now[t] * own()[t] + D), load<T>(x[t]), load<T>(o + t * W)));
    const auto ungated = [&](int64_t t) { return load<T>(y + t * W); };
    if (a_.y.data) write_rows<T>(a_.y, slot.batch, slot.head, block * W, width, tile, ungated);
    if (!p.z.data) return write_rows<T>(a_.out, slot.batch, slot.head, block * W, width, tile, ungated);
    const View<T> z = this->block_of(p.z, slot, tile, block, z_buffer);
    write_rows<T>(a_.out, slot.batch, slot.head, block * W, width, tile, [&](int64_t t) { return ungated(t) * silu<T>(load<T>(z[t])); });
  }

 private:
  static constexpr int W = kLanes<T>;

  T* x_buffer() const { return memory_.data() + kTileSteps * W; }
  T* own() const { return memory_.data() + 4 * kTileSteps * W; }

  const Arguments& a_;
  const Scratch<T> rows_;    // q and k
  const Scratch<T> memory_;  // v, x, y and z of a block; q_t . k_t of each step
};

template <class T> void forward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse);
  prefer_huge_pages_for(p.batch, a.out, a.y);
  const Steps<T> steps(p, walk, a.angle_last);
  scan<T>({p.batch, p.heads, 1, p.states, p.size}, walk, p.length, p.threads, p.initial, a.final, {}, 0, [&] { return Forward<T>(a, steps); });
}

}  // namespace

MEDSSM_EXPORT(ssd3_forward, Arguments) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
