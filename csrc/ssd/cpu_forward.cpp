// SSD, forward, on a CPU:  S = exp(s_t A) S + B_t (s_t x_t),  y_t = C_t S + D x_t,  out_t = y_t silu(z_t).
#include "problem.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  HeadOutput out, y;  // y: the compute type; may be null
  StateTensor final;  // the compute type; may be null
};

template <class T> class Forward : public Reader<T, false, false, true> {
 public:
  Forward(const Arguments& a, const Steps<T>& steps) :
      Forward::Reader(a.problem, steps, a.problem.states, {a.problem.C, a.problem.heads / a.problem.groups},
                      {a.problem.B, a.problem.heads / a.problem.groups}, {a.problem.x, 1}),
      a_(a),
      memory_(3 * kTileSteps * W) {}

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>&, const T* o) const {
    const Problem& p = a_.problem;
    const int width = slot.width(block);
    T *const y = memory_.data(), *const x_buffer = y + kTileSteps * W, *const z_buffer = x_buffer + kTileSteps * W;
    if (p.D) {
      const Vec<T> D = skip_of(p, slot, block);
      const View<T> x = this->block_of({p.x, 1}, slot, tile, block, x_buffer);
      for (int64_t t = 0; t < tile.count; ++t) store(y + t * W, fma(D, load<T>(x[t]), load<T>(o + t * W)));
      o = y;
    }
    const auto ungated = [&](int64_t t) { return load<T>(o + t * W); };
    if (a_.y.data) write_rows<T>(a_.y, slot.batch, slot.head, block * W, width, tile, ungated);
    if (!p.z.data) return write_rows<T>(a_.out, slot.batch, slot.head, block * W, width, tile, ungated);
    const View<T> z = this->block_of({p.z, 1}, slot, tile, block, z_buffer);
    write_rows<T>(a_.out, slot.batch, slot.head, block * W, width, tile, [&](int64_t t) { return load<T>(o + t * W) * silu<T>(load<T>(z[t])); });
  }

 private:
  static constexpr int W = kLanes<T>;
  const Arguments& a_;
  const Scratch<T> memory_;  // y, x and z of a tile
};

template <class T> void forward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse);
  prefer_huge_pages_for(p.batch, a.out, a.y);
  const Steps<T> steps(p, walk);
  scan<T>({p.batch, p.heads, 1, p.states, p.size}, walk, p.length, p.threads, p.initial, a.final, {}, 0, [&] { return Forward<T>(a, steps); });
}

}  // namespace

MEDSSM_EXPORT(ssd_forward, Arguments) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
