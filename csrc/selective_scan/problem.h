// What forward and backward share: the arguments, the blocks of channels, and the walk through the tokens in tiles.
//
// A block is one vector of channels (fewer at the end of a group). A tile is a run of at most 64 steps of the walk that no segment start
// interrupts. A chunk is the run of steps between two checkpoints of the state.
#pragma once
#include "arguments.h"
#include "medssm/simd.h"

namespace medssm {
namespace {

MEDSSM_INLINE int64_t element_size(int64_t type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// Threads share the work by items: a block of one batch element. Where items are fewer than threads, by halves of an item's states:
// the sums over states are always those of the first half plus those of the second, so that the bits do not depend on who adds.
MEDSSM_INLINE int64_t first_half(int64_t state) { return ceil_div(state, 2); }

struct Block {
  int64_t batch, group, channel;  // of the batch element, the group and the first channel
  int lanes;                      // channels in it
};

template <class T> struct Blocks {
  int64_t width, per_group, count;  // channels per group, blocks per group, blocks in all
  explicit Blocks(const Problem& p) : width(p.channels / p.groups), per_group(ceil_div(width, kLanes<T>)), count(per_group * p.groups) {}
  Block operator[](int64_t item) const {
    const int64_t batch = item / count, block = item % count, group = block / per_group, within = block % per_group * kLanes<T>;
    return {batch, group, group * width + within, static_cast<int>(least<int64_t>(kLanes<T>, width - within))};
  }
};

// Steps [from, from + count) of the walk. Where index is null, step from + t is at token first + t * direction; else at
// index[first + t * direction].
struct Tile {
  int64_t from, count;
  bool fresh;  // the state begins anew at `from`
  const int64_t* index;
  int64_t first, direction;
  int64_t token(int64_t t) const { return index ? index[first + t * direction] : first + t * direction; }
};

class Walk {
 public:
  explicit Walk(const Problem& p) : p_(p) {}

  // Steps [from, end), a segment start or not: for a prefetch.
  Tile steps(int64_t from, int64_t end) const {
    return {from, end - from, false, p_.index, p_.reverse ? p_.length - 1 - from : from, p_.reverse ? -1 : 1};
  }

  // The tile that begins at `from`, ending before `end`, the next multiple of kTile and the next start.
  Tile tile(int64_t from, int64_t end) const {
    end = least(least(end, p_.length), round_up(from + 1, kTile));
    const int64_t next = first_start(from);
    const bool fresh = from > 0 && next < p_.start_count && start(next) == from;
    if (next + fresh < p_.start_count) end = least(end, start(next + fresh));
    Tile tile = steps(from, end);
    tile.fresh = fresh;
    return tile;
  }

  // The tiles of steps [from, end), into `tiles` (end - from of them at most); returns how many.
  int64_t tiles(int64_t from, int64_t end, Tile* tiles) const {
    int64_t count = 0;
    for (end = least(end, p_.length); from < end; from += tiles[count++].count) tiles[count] = tile(from, end);
    return count;
  }

 private:
  // The i-th step at which a segment begins; turned round with the walk. Step 0 and the end of the walk are not among them in effect:
  // the initial state precedes step 0.
  int64_t start(int64_t i) const { return p_.reverse ? p_.length - p_.starts[p_.start_count - 1 - i] : p_.starts[i]; }
  int64_t first_start(int64_t from) const {
    int64_t low = 0, high = p_.start_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start(middle) < most<int64_t>(from, 1)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  const Problem& p_;
};

}  // namespace
}  // namespace medssm
