// The arguments of bidirectional WKV, and how a segment of the walk is cut into chunks and tiles.
#pragma once
#include <type_traits>

#include "medssm/parallel.h"
#include "medssm/scratch.h"
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

// The argument block that kernels/bi_wkv/native.py packs. Strides are in elements.
struct Tokens {  // (b, l, d), adjacent channels
  void* data;    // read only, if it is an input
  int64_t type, batch, token;
};
struct Problem {
  Tokens k, v;
  const void *w, *u;              // (d,), dense, the compute type
  const int64_t *index, *bounds;  // index: the token of each step, null for raster. bounds: the first step of each segment, then the
                                  // length; null for one segment
  int64_t segments, reverse;      // reverse: walk through index backwards; bounds count steps of that reversed walk
  int64_t batch, length, channels;
  int64_t upstream, wide, threads;  // wide: compute in double
};

MEDSSM_INLINE int64_t element_size(const Tokens& tokens) { return tokens.type == kFloat64 ? 8 : tokens.type == kFloat32 ? 4 : 2; }

// Asks for large pages for an output of k's shape, before the first write.
MEDSSM_INLINE void prefer_huge_pages(const Problem& p, const Tokens& result) {
  medssm::prefer_huge_pages(result.data, p.batch * p.length * p.channels * element_size(result));
}

constexpr int64_t kTile = 32;    // most steps of a tile
constexpr int64_t kChunks = 32;  // chunks per segment in mode "upstream"
constexpr double kEps = 1e-6;    // added to the denominator in mode "upstream"

// One tile of a segment: the steps [from, from + count) of the walk. It lies in one chunk.
struct Run {
  int64_t from, count;
  bool first, last;  // whether it is the first, and the last, tile of its chunk
};

// A segment is cut into chunks, and a chunk into tiles. In mode "exact" the segment is one chunk.
class Segment {
 public:
  Segment(const Problem& p, int64_t i) :
      begin_(p.bounds ? p.bounds[i] : 0),
      end_(p.bounds ? p.bounds[i + 1] : p.length),
      chunk_(p.upstream ? ceil_div(end_ - begin_, kChunks) : end_ - begin_),
      tiles_(ceil_div(chunk_, kTile)) {}

  static int64_t most_tiles(const Problem& p) { return ceil_div(p.length, kTile) + 2 * kChunks; }

  // f(i, run) for each tile: from the first to the last, and from the last to the first.
  template <class F> void each_tile(const F& f) const {
    for (int64_t i = 0; i < count(); ++i) visit(i, f);
  }
  template <class F> void each_tile_back(const F& f) const {
    for (int64_t i = count() - 1; i >= 0; --i) visit(i, f);
  }

 private:
  int64_t count() const { return end_ > begin_ ? ceil_div(end_ - begin_, chunk_) * tiles_ : 0; }
  template <class F> void visit(int64_t i, const F& f) const {
    const int64_t chunk = begin_ + i / tiles_ * chunk_, end = least(chunk + chunk_, end_), from = chunk + i % tiles_ * kTile;
    if (from < end) f(i, Run{from, least(kTile, end - from), from == chunk, from + kTile >= end});  // the last chunk may have fewer tiles
  }

  int64_t begin_, end_, chunk_, tiles_;
};

template <class Body> void each_segment(const Problem& p, const Body& body) {
  for (int64_t i = 0; i < p.segments; ++i) body(Segment(p, i));
}

// One vector of channels of one batch element. The last block of the channels may use only the first lanes.
template <class T> struct Block {
  static constexpr int W = kLanes<T>;
  int64_t batch, channel;
  int lanes;

  Block(const Problem& p, int64_t item) :
      batch(item / count(p)), channel(item % count(p) * W), lanes(static_cast<int>(least<int64_t>(W, p.channels - channel))) {}
  static int64_t count(const Problem& p) { return ceil_div(p.channels, W); }

  Vec<T> weight(const void* data) const { return load_part<T>(static_cast<const T*>(data) + channel, lanes); }

  // An estimate of the mean over all tokens, from every 16th one. Zero where the mean is not finite.
  Vec<T> mean(const Tokens& tokens, int64_t length) const {
    constexpr int64_t kEvery = 16;
    const int64_t some = ceil_div(length, kEvery);
    const auto tile = [&](int64_t i) { return Tile{0, most<int64_t>(0, least(kTile, some - i)), false, nullptr, i * kEvery, kEvery}; };
    Vec<T> rows[kTile], sum = {};
    for (int64_t i = 0; i < some; i += kTile) {
      const Tile here = tile(i);
      prefetch_rows(tokens, tile(i + kTile));
      load_rows(tokens, here, rows);
      for (int64_t t = 0; t < here.count; ++t) sum += rows[t];
    }
    sum /= splat(T(some));
    return sum - sum == Vec<T>{} ? sum : Vec<T>{};
  }

  // Prefetches a tile's tokens. The stride between tokens is too large for the processor's own prefetcher.
  void prefetch_rows(const Tokens& tokens, const Tile& run) const {
    const int64_t size = element_size(tokens);
    const char* data = static_cast<const char*>(tokens.data) + (batch * tokens.batch + channel) * size;
    for (int64_t t = 0; t < run.count; ++t) __builtin_prefetch(data + run.token(t) * tokens.token * size);
  }

  // Loads a tile's tokens, converted to the compute type: one vector for each token.
  void load_rows(const Tokens& tokens, const Tile& run, Vec<T>* rows) const {
    with_storage(tokens.type, static_cast<const void*>(tokens.data), [&](const auto* data) {
      data += batch * tokens.batch + channel;
      for (int64_t t = 0; t < run.count; ++t) {
        const auto* row = data + run.token(t) * tokens.token;
        rows[t] = lanes == W ? load<T>(row) : load_part<T>(row, lanes);
      }
    });
  }
  void store_rows(const Tokens& tokens, const Tile& run, const Vec<T>* rows) const {
    with_storage(tokens.type, tokens.data, [&](auto* data) {
      data += batch * tokens.batch + channel;
      for (int64_t t = 0; t < run.count; ++t) {
        auto* row = data + run.token(t) * tokens.token;
        if (lanes == W)
          medssm::store(row, rows[t]);
        else
          store_part(row, rows[t], lanes);
      }
    });
  }
};

// How many neighbouring blocks of channels one thread processes together, tile by tile: their data share cache lines and pages. The result has the
// same bits for any number.
constexpr int64_t kTogether = 4;

// The walkers of one group of blocks, one for each block.
template <class Walker> struct Walkers {
  Walker *first, *last;
  Walker* begin() const { return first; }
  Walker* end() const { return last; }
};

// The threads share the blocks of all batch elements. body(walkers) runs for each group of at most kTogether blocks. make(memory, block, i) makes the
// walker of the i-th block of a group. Each thread has one scratch memory, Memory(p, blocks).
template <class T, class Walker, class Memory, class Make, class Body> void each_group(const Problem& p, const Make& make, const Body& body) {
  static_assert(std::is_trivially_destructible_v<Walker>, "walkers are left where they are");
  struct Own {
    Memory memory;
    Scratch<Walker> walkers;
  };
  const int64_t items = p.batch * Block<T>::count(p);
  const int64_t threads = most<int64_t>(1, least(least(p.threads, items), ceil_div(p.batch * p.length * p.channels, 4096)));
  const int64_t together = least(kTogether, ceil_div(items, threads));
  const PerThread<Own> own(threads, [&] { return Own{Memory(p, together), Scratch<Walker>(together)}; });
  parallel(threads, [&](const Team& team) {
    const auto& [memory, walkers] = own[team.rank];
    const Range mine = share(items, team);
    for (int64_t item = mine.begin; item < mine.end; item += together) {
      const int64_t count = least(together, mine.end - item);
      for (int64_t i = 0; i < count; ++i) new (walkers.data() + i) Walker(make(memory, Block<T>(p, item + i), i));
      body(Walkers<Walker>{walkers.data(), walkers.data() + count});
    }
  });
}

}  // namespace
}  // namespace medssm
