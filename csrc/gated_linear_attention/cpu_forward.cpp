// Gated linear attention, forward, on a CPU:  S = e_t S + k_t v_t,  o_t = scale q_t S, with e_t = exp(g_t).
#include "problem.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  HeadOutput out;
  StateTensor final;  // the compute type; may be null
};

template <class T, Decay kDecay> class Forward : public Reader<T, Form<kDecay, false, false>> {
 public:
  explicit Forward(const Arguments& a) : Forward::Reader(a.problem, a.problem.keys, a.problem.q, a.problem.k, a.problem.v, 1.0), a_(a) {}

  void take(const Slot<T>& slot, const Tile& tile, int64_t block, const Operands<T>&, const T* o) const {
    const Vec<T> scale = splat(static_cast<T>(a_.problem.scale));
    write_rows<T>(a_.out, slot.batch, slot.head, block * kLanes<T>, slot.width(block), tile,
                  [&](int64_t t) { return load<T>(o + t * kLanes<T>) * scale; });
  }

 private:
  const Arguments& a_;
};

template <class T, Decay kDecay> void forward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.starts, p.sequences, p.start_count, p.reverse);
  prefer_huge_pages(a.out, p.batch);
  scan<T>({p.batch, p.heads, 1, p.keys, p.values}, walk, p.length, p.threads, p.initial, a.final, {}, 0, [&] { return Forward<T, kDecay>(a); });
}

template <class T> void forward(const Arguments& a) { a.problem.per_key ? forward<T, Decay::kRows>(a) : forward<T, Decay::kWhole>(a); }

}  // namespace

MEDSSM_EXPORT(gated_linear_attention_forward, Arguments) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
