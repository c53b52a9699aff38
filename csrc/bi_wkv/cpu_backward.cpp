// Bidirectional WKV, backward, on a CPU.
//
// With o_t = (sum_i W_ti v_i) / D_t, x_t = do_t / D_t and y_t = x_t o_t:
//
//     dv_i = sum_t W_ti x_t,    dk_i = sum_t W_ti (x_t v_i - y_t)
//
// which are sums like the forward ones with the roles of tokens and outputs exchanged: of the key -log D_t and the values x_t and y_t. The forward
// pass is made again; it gives them (D_t as e^top and a number beside it), and the gradients of w, from the sums' derivatives, and of u. The outputs
// that lie behind a token are summed on the way, their sums before each tile kept; a sweep from the end goes through each tile both ways. Nothing
// that is kept but x, y and top is longer than the number of tiles.
//
// Each block adds up its own shares of dw and du; those of the batch elements are added in order: any number of threads gives the same bits.
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

// An output, as the tokens see it: its key is -top, its values x and y.
template <class T> struct Output {
  Vec<T> top, x, y;
};

template <class T> struct Memory {
  int64_t tiles, length;
  Scratch<Sums<T>> ahead, behind;  // of each tile of a segment: tokens, outputs; block after block
  Scratch<Output<T>> outputs;      // of each step
  Scratch<bool> level;             // of each tile
  Memory(const Problem& p, int64_t blocks) :
      tiles(Segment::most_tiles(p)),
      length(p.length),
      ahead(blocks * tiles),
      behind(blocks * tiles),
      outputs(blocks * length),
      level(blocks * tiles) {
    medssm::prefer_huge_pages(outputs.data(), blocks * length * static_cast<int64_t>(sizeof(Output<T>)));
  }
};

template <class T, bool kUpstream> class Backward {
 public:
  // i: the block's place in the memory.
  Backward(const Arguments& a, const Walk& walk, const Block<T>& block, const Memory<T>& memory, int64_t i) :
      a_(a),
      p_(a.problem),
      forward_(p_, walk, block, memory.ahead.data() + i * memory.tiles),
      kept_behind_(memory.behind.data() + i * memory.tiles),
      outputs_(memory.outputs.data() + i * memory.length),
      level_(memory.level.data() + i * memory.tiles) {}

  void begin() {
    forward_.begin();
    behind_ = Sums<T>::empty();
    future_ = Behind<T, kUpstream>();
  }
  void retreat(int64_t i, const Run& run) { forward_.retreat(i, run); }

  // The outputs of a tile, and its shares of dw and du.
  void advance(int64_t i, const Run& run) {
    Vec<T> dout[kTile], dw = {}, du = {};
    forward_.block().prefetch_rows(a_.dout, forward_.rows_after(run));
    forward_.block().load_rows(a_.dout, forward_.rows(run), dout);
    kept_behind_[i] = behind_;
    Output<T>* outputs = outputs_ + run.from;
    const Vec<T> w = forward_.rate().w;
    level_[i] = forward_.advance(i, run, [&](int64_t t, Vec<T> v, const Quotient<T>& q) __attribute__((always_inline)) {
      const Vec<T> x = dout[t] * q.inverse, y = x * q.out;
      outputs[t] = {q.top, x, y};
      dw += x * q.slope_a - y * q.slope_b;
      du += q.own * (x * v - y);
    });
    if (level_[i]) {
      Partial<T> sum;
      for (int64_t t = 0; t < run.count; ++t) sum.template add<false>(forward_.level(), outputs[t].x, outputs[t].y);
      behind_ = sum.behind(behind_, w, run.count, -outputs[0].top);
    } else {
      Sums<T> tile = Sums<T>::empty();
      for (int64_t t = 0; t < run.count; ++t) tile.template add<false>(w, -outputs[t].top, outputs[t].x, outputs[t].y);
      behind_ = behind_.later(w, splat(T(run.count))).with(tile);
    }
    dw_ += dw;
    du_ += du;
  }

  // dk and dv of a tile.
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
      if (level_[i] && Level<T>::near(outputs[0].top, kept_behind_[i], future_.passed())) {
        finish_level(run, outputs, k, v, kept_behind_[i], dk, dv);
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
    Sums<T> past = kept_behind_[i];
    for (int64_t t = 0; t < run.count; ++t) {
      const Output<T>& o = outputs[t];
      const Vec<T> own = weight(u + k[t] - o.top);
      dk[t] = own * (o.x * v[t] - o.y);
      dv[t] = own * o.x;
      share(t, ahead<T, kUpstream>(rate, past.seen));
      past.template add<false>(rate.w, -o.top, o.x, o.y);
    }
    if (run.last) future_.begin_chunk(rate);
    Behind<T, kUpstream> future = future_;
    future.begin(rate);
    for (int64_t t = run.count - 1; t >= 0; --t) {
      constexpr int kTerms = Behind<T, kUpstream>::kTerms;
      const Output<T>& o = outputs[t];
      Term<T> terms[kTerms];
      future.template take<false>(rate, -o.top, o.x, o.y);
      future.template see<false>(rate, terms);
      const int seen = kUpstream && run.first && t == 0 ? kTerms - 1 : kTerms;  // nothing is taken of a chunk's first token
      for (int term = 0; term < seen; ++term) share(t, terms[term]);
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
  // e^x of a weight over an output's top. A level tile's top is its own heaviest key: heavier tokens elsewhere, and the bonus, go above it so far.
  static MEDSSM_INLINE Vec<T> weight(Vec<T> x) { return exp_bounded<T>(max(splat(-kExpBound<T>), min(splat(Level<T>::kAbove), x))); }

  MEDSSM_INLINE void finish_level(const Run& run, const Output<T>* outputs, const Vec<T>* k, const Vec<T>* v, const Sums<T>& past, Vec<T>* dk,
                                  Vec<T>* dv) {
    const Level<T>& level = forward_.level();
    const Vec<T> base = outputs[0].top;
    const Outside<T> before(past, -base), after(future_.passed(), -base);
    Partial<T> sum, sums[kTile];
    for (int64_t t = 0; t < run.count; ++t) {
      const Output<T>& o = outputs[t];
      sums[t] = {fma(level.bonus, o.x, sum.a), fma(level.bonus, o.y, sum.b), sum.slope_a, sum.slope_b};
      before.template add_to<false>(sums[t], level, t);
      sum.template add<false>(level, o.x, o.y);
    }
    sum = {};
    for (int64_t t = run.count - 1; t >= 0; --t) {
      Partial<T>& all = sums[t];
      all.a += sum.a;
      all.b += sum.b;
      after.template add_to<false>(all, level, run.count - 1 - t);
      const Vec<T> weight = exp_bounded<T>(k[t] - base);
      dk[t] = weight * (all.a * v[t] - all.b);
      dv[t] = weight * all.a;
      sum.template add<false>(level, outputs[t].x, outputs[t].y);
    }
    future_.passed() = sum.behind(future_.passed(), forward_.rate().w, run.count, -base);
  }

  const Arguments& a_;
  const Problem& p_;
  Outputs<T, kUpstream, true> forward_;
  Sums<T>* const kept_behind_;
  Output<T>* const outputs_;
  bool* const level_;                  // of each tile, whether its outputs have one top
  Sums<T> behind_ = Sums<T>::empty();  // outputs
  Behind<T, kUpstream> future_;        // outputs
  Vec<T> dw_ = {}, du_ = {};
};

template <class T, bool kUpstream> void backward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, nullptr, 0, p.reverse);
  prefer_huge_pages(p, a.dk);
  prefer_huge_pages(p, a.dv);
  using Walker = Backward<T, kUpstream>;
  const auto make = [&](const Memory<T>& memory, const Block<T>& block, int64_t i) { return Walker(a, walk, block, memory, i); };
  each_group<T, Walker, Memory<T>>(p, make, [&](const Walkers<Walker>& blocks) {
    each_segment(p, [&](const Segment& segment) {
      for (auto& block : blocks) block.begin();
      segment.each_tile_back([&](int64_t i, const Run& run) {
        for (auto& block : blocks) block.retreat(i, run);
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
