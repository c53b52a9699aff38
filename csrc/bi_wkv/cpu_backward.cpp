// Bidirectional WKV, backward, on a CPU.
//
// With o_t = (sum_i W_ti v_i) / D_t, x_t = do_t / D_t and y_t = x_t o_t:
//
//     dv_i = sum_t W_ti x_t,    dk_i = sum_t W_ti (x_t v_i - y_t)
//
// These are sums like those of the forward pass, with the roles of tokens and outputs exchanged: the key is -log D_t, the values are x_t and y_t.
// A first part repeats the forward computation. It gives x_t and y_t, with D_t as e^top times a number, the gradient of w from the derivatives of the
// sums, and the gradient of u. It also stores, for each tile, the sum over the outputs before that tile. A last sweep, from the end to the start,
// goes through each tile in both directions and writes dk and dv. Only x, y and top are stored for each step; everything else is stored for each
// tile.
//
// Each block computes its own dw and du. They are later added over the batch in a fixed order, so any number of threads gives the same bits.
#include <initializer_list>

#include "medssm/abi.h"
#include "outputs.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  Tokens dout, dk, dv;
  void *dw, *du;  // (b, d), dense, the compute type
};

// An output as an item of the sums of the backward pass: its key is -top, its values are x and y.
template <class T> struct Output {
  Vec<T> top, x, y;
};

template <class T> struct Memory {
  int64_t tiles, length;
  Scratch<Sums<T>> ahead, before;  // [block][tile]: sums over the tokens after a tile, over the outputs before it
  Scratch<Output<T>> outputs;      // [block][step]
  Scratch<bool> one_top;           // [block][tile]
  Memory(const Problem& p, int64_t blocks) :
      tiles(Segment::most_tiles(p)),
      length(p.length),
      ahead(blocks * tiles),
      before(blocks * tiles),
      outputs(blocks * length),
      one_top(blocks * tiles) {
    medssm::prefer_huge_pages(outputs.data(), blocks * length * static_cast<int64_t>(sizeof(Output<T>)));
  }
};

template <class T, bool kUpstream> class Backward {
 public:
  // i: the index of the block in the scratch memory.
  Backward(const Arguments& a, const Walk& walk, const Block<T>& block, const Memory<T>& memory, int64_t i) :
      a_(a),
      p_(a.problem),
      forward_(p_, walk, block, memory.ahead.data() + i * memory.tiles),
      sums_before_(memory.before.data() + i * memory.tiles),
      outputs_(memory.outputs.data() + i * memory.length),
      one_top_(memory.one_top.data() + i * memory.tiles) {}

  void begin() {
    forward_.begin();
    outputs_before_ = Sums<T>::empty();
    future_ = PassedSums<T, kUpstream>();
  }
  void sum_ahead(int64_t i, const Run& run) { forward_.sum_ahead(i, run); }

  // A tile of the sweep from the start: x, y and top of its outputs; adds what the tile contributes to dw and du.
  void advance(int64_t i, const Run& run) {
    Vec<T> dout[kTile], dw = {}, du = {};
    forward_.block().prefetch_rows(a_.dout, forward_.rows_after(run));
    forward_.block().load_rows(a_.dout, forward_.rows(run), dout);
    sums_before_[i] = outputs_before_;
    Output<T>* outputs = outputs_ + run.from;
    const Vec<T> w = forward_.rate().w;
    one_top_[i] = forward_.advance(i, run, [&](int64_t t, Vec<T> v, const Quotient<T>& q) __attribute__((always_inline)) {
      const Vec<T> x = dout[t] * q.inverse, y = x * q.out;
      outputs[t] = {q.top, x, y};
      dw += x * q.slope_a - y * q.slope_b;
      du += q.own * (x * v - y);
    });
    if (one_top_[i]) {
      Partial<T> sum;
      for (int64_t t = 0; t < run.count; ++t) sum.template add<false>(forward_.shared(), outputs[t].x, outputs[t].y);
      outputs_before_ = sum.added_to(outputs_before_, w, run.count, -outputs[0].top);
    } else {
      Sums<T> tile = Sums<T>::empty();
      for (int64_t t = 0; t < run.count; ++t) tile.template add<false>(w, -outputs[t].top, outputs[t].x, outputs[t].y);
      outputs_before_ = outputs_before_.later(w, splat(T(run.count))).plus(tile);
    }
    dw_ += dw;
    du_ += du;
  }

  // A tile of the last sweep: writes its dk and dv.
  void finish(int64_t i, const Run& run) {
    const Block<T>& block = forward_.block();
    const Rate<T> rate = forward_.rate();
    const Tile rows = forward_.rows(run);
    const Vec<T> u = block.weight(p_.u);
    const Output<T>* outputs = outputs_ + run.from;
    Vec<T> k[kTile], v[kTile], dk[kTile], dv[kTile];
    for (const Tokens* tokens : {&p_.k, &p_.v, &a_.dk, &a_.dv}) block.prefetch_rows(*tokens, forward_.rows_before(run));
    forward_.load(run, k, v);
    if constexpr (!kUpstream) {
      if (one_top_[i] && SharedShift<T>::can_scale(outputs[0].top, sums_before_[i], future_.passed())) {
        finish_shared(run, outputs, k, v, sums_before_[i], dk, dv);
        block.store_rows(a_.dk, rows, dk);
        block.store_rows(a_.dv, rows, dv);
        return;
      }
    }
    const auto share = [&](int64_t t, const Term<T>& term) __attribute__((always_inline)) {
      const Vec<T> scale = weight(k[t] + term.shift);
      dk[t] = fma(scale, term.a * v[t] - term.b, dk[t]);
      dv[t] = fma(scale, term.a, dv[t]);
    };
    Sums<T> past = sums_before_[i];
    for (int64_t t = 0; t < run.count; ++t) {
      const Output<T>& o = outputs[t];
      const Vec<T> own = weight(u + k[t] - o.top);
      dk[t] = own * (o.x * v[t] - o.y);
      dv[t] = own * o.x;
      share(t, ahead<T, kUpstream>(rate, past.term));
      past.template add<false>(rate.w, -o.top, o.x, o.y);
    }
    if (run.last) future_.begin_chunk(rate);
    PassedSums<T, kUpstream> future = future_;
    future.begin(rate);
    for (int64_t t = run.count - 1; t >= 0; --t) {
      constexpr int kTerms = PassedSums<T, kUpstream>::kTerms;
      const Output<T>& o = outputs[t];
      Term<T> terms[kTerms];
      future.template subtract<false>(rate, -o.top, o.x, o.y);
      future.template terms<false>(rate, terms);
      const int count = kUpstream && run.first && t == 0 ? kTerms - 1 : kTerms;  // the error term leaves out the chunk's first token
      for (int term = 0; term < count; ++term) share(t, terms[term]);
      future.template add<false>(rate, -o.top, o.x, o.y);
    }
    future.end(rate);
    future_ = future;
    block.store_rows(a_.dk, rows, dk);
    block.store_rows(a_.dv, rows, dv);
  }

  void write_sums() const {
    const Block<T>& block = forward_.block();
    const int64_t at = block.batch * p_.channels + block.channel;
    store_part(static_cast<T*>(a_.dw) + at, dw_, block.lanes);
    store_part(static_cast<T*>(a_.du) + at, du_, block.lanes);
  }

 private:
  // e^x, where x is the exponent of a weight less an output's top. x can be larger than 0 where a tile has one top, the largest of its own keys: the
  // bonus and tokens of other tiles can have larger exponents, but none above kMaxExponent.
  static MEDSSM_INLINE Vec<T> weight(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), min(splat(SharedShift<T>::kMaxExponent), x))); }

  MEDSSM_INLINE void finish_shared(const Run& run, const Output<T>* outputs, const Vec<T>* k, const Vec<T>* v, const Sums<T>& past, Vec<T>* dk,
                                   Vec<T>* dv) {
    const SharedShift<T>& shared = forward_.shared();
    const Vec<T> base = outputs[0].top;
    const Outside<T> before(past, -base), after(future_.passed(), -base);
    Partial<T> sum, sums[kTile];
    for (int64_t t = 0; t < run.count; ++t) {
      const Output<T>& o = outputs[t];
      sums[t] = {fma(shared.bonus, o.x, sum.a), fma(shared.bonus, o.y, sum.b), sum.slope_a, sum.slope_b};
      before.template add_to<false>(sums[t], shared, t);
      sum.template add<false>(shared, o.x, o.y);
    }
    sum = {};
    for (int64_t t = run.count - 1; t >= 0; --t) {
      Partial<T>& all = sums[t];
      all.a += sum.a;
      all.b += sum.b;
      after.template add_to<false>(all, shared, run.count - 1 - t);
      const Vec<T> weight = exp_bounded<T>(k[t] - base);
      dk[t] = weight * (all.a * v[t] - all.b);
      dv[t] = weight * all.a;
      sum.template add<false>(shared, outputs[t].x, outputs[t].y);
    }
    future_.passed() = sum.added_to(future_.passed(), forward_.rate().w, run.count, -base);
  }

  const Arguments& a_;
  const Problem& p_;
  Outputs<T, kUpstream, true> forward_;
  Sums<T>* const sums_before_;
  Output<T>* const outputs_;
  bool* const one_top_;                        // for each tile, whether all its outputs have the same top
  Sums<T> outputs_before_ = Sums<T>::empty();  // over the outputs before the present step
  PassedSums<T, kUpstream> future_;            // over the outputs after it
  Vec<T> dw_ = {}, du_ = {};
};

template <class T, bool kUpstream> void backward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.reverse);
  prefer_huge_pages(p, a.dk);
  prefer_huge_pages(p, a.dv);
  using Walker = Backward<T, kUpstream>;
  const auto make = [&](const Memory<T>& memory, const Block<T>& block, int64_t i) { return Walker(a, walk, block, memory, i); };
  each_group<T, Walker, Memory<T>>(p, make, [&](const Walkers<Walker>& blocks) {
    each_segment(p, [&](const Segment& segment) {
      for (auto& block : blocks) block.begin();
      segment.each_tile_back([&](int64_t i, const Run& run) {
        for (auto& block : blocks) block.sum_ahead(i, run);
      });
      segment.each_tile([&](int64_t i, const Run& run) {
        for (auto& block : blocks) block.advance(i, run);
      });
      segment.each_tile_back([&](int64_t i, const Run& run) {
        for (auto& block : blocks) block.finish(i, run);
      });
    });
    for (auto& block : blocks) block.write_sums();
  });
}

template <class T> void backward(const Arguments& a) { a.problem.upstream ? backward<T, true>(a) : backward<T, false>(a); }

}  // namespace

MEDSSM_EXPORT(bi_wkv_backward, Arguments) { a.problem.wide ? backward<double>(a) : backward<float>(a); }
