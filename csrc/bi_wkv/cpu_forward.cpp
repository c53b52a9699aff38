// Bidirectional WKV, forward, on a CPU. The threads share the blocks of channels of all batch elements.
#include "medssm/abi.h"
#include "outputs.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  Tokens out;
};

template <class T> struct Memory {
  int64_t tiles;
  Scratch<Sums<T>> ahead;  // [block][tile]
  Memory(const Problem& p, int64_t blocks) : tiles(Segment::most_tiles(p)), ahead(blocks * tiles) {}
};

template <class T, bool kUpstream> void forward(const Arguments& a) {
  const Problem& p = a.problem;
  const Walk walk(p.length, p.index, p.reverse);
  prefer_huge_pages(p, a.out);
  using Walker = Outputs<T, kUpstream, false>;
  const auto make = [&](const Memory<T>& memory, const Block<T>& block, int64_t i) {
    return Walker(p, walk, block, memory.ahead.data() + i * memory.tiles);
  };
  each_group<T, Walker, Memory<T>>(p, make, [&](const Walkers<Walker>& blocks) {
    each_segment(p, [&](const Segment& segment) {
      for (auto& block : blocks) block.begin();
      segment.each_tile_back([&](int64_t i, const Run& run) {
        for (auto& block : blocks) block.sum_ahead(i, run);
      });
      segment.each_tile([&](int64_t i, const Run& run) {
        for (auto& block : blocks) {
          Vec<T> out[kTile];
          block.block().prefetch_rows(a.out, block.rows_after(run));
          block.advance(i, run, [&](int64_t t, Vec<T>, const Quotient<T>& q) __attribute__((always_inline)) { out[t] = q.out; });
          block.block().store_rows(a.out, block.rows(run), out);
        }
      });
    });
  });
}

template <class T> void forward(const Arguments& a) { a.problem.upstream ? forward<T, true>(a) : forward<T, false>(a); }

}  // namespace

MEDSSM_EXPORT(bi_wkv_forward, Arguments) { a.problem.wide ? forward<double>(a) : forward<float>(a); }
