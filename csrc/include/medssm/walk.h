// The order in which a recurrence visits the tokens (the walk), divided into tiles.
//
// A tile is at most kTileSteps consecutive steps of the walk. A segment can begin only at the first step of a tile.
#pragma once
#include "medssm/storage.h"

namespace medssm {
namespace {

constexpr int64_t kTileSteps = 64;

// Steps [from, from + count) of the walk. Step from + t visits token first + t * direction if index is null, otherwise token
// index[first + t * direction].
struct Tile {
  int64_t from, count;
  bool fresh;  // the state is reset to zero before step `from`
  const int64_t* index;
  int64_t first, direction;
  int64_t token(int64_t t) const { return index ? index[first + t * direction] : first + t * direction; }
};

class Walk {
 public:
  // index: the token of each step, null for raster order. starts: the sorted steps before which the state is reset to zero, numbered in forward
  // direction. reverse: the same walk from its end.
  Walk(int64_t length, const int64_t* index, const int64_t* starts, int64_t start_count, bool reverse) :
      length_(length), index_(index), starts_(starts), start_count_(start_count), reverse_(reverse) {}

  // Steps [from, end), ignoring segment starts. Used for prefetches and single steps.
  Tile steps(int64_t from, int64_t end) const { return {from, end - from, false, index_, reverse_ ? length_ - 1 - from : from, reverse_ ? -1 : 1}; }

  // The tile that begins at `from`. It ends at `end`, the next multiple of kTileSteps or the next segment start, whichever comes first.
  Tile tile(int64_t from, int64_t end) const {
    end = least(least(end, length_), round_up(from + 1, kTileSteps));
    const int64_t next = first_start(from);
    const bool fresh = from > 0 && next < start_count_ && start(next) == from;
    if (next + fresh < start_count_) end = least(end, start(next + fresh));
    Tile tile = steps(from, end);
    tile.fresh = fresh;
    return tile;
  }

  // Writes the tiles of steps [from, end) to `tiles` (at most end - from of them) and returns their number.
  int64_t tiles(int64_t from, int64_t end, Tile* tiles) const {
    int64_t count = 0;
    for (end = least(end, length_); from < end; from += tiles[count++].count) tiles[count] = tile(from, end);
    return count;
  }

 private:
  // The i-th step at which a segment begins, in the direction of the walk. Starts at step 0 and at the end of the walk have no effect: the initial
  // state comes before step 0.
  int64_t start(int64_t i) const { return reverse_ ? length_ - starts_[start_count_ - 1 - i] : starts_[i]; }
  int64_t first_start(int64_t from) const {
    int64_t low = 0, high = start_count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start(middle) < most<int64_t>(from, 1))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  const int64_t length_;
  const int64_t *const index_, *const starts_;
  const int64_t start_count_;
  const bool reverse_;
};

}  // namespace
}  // namespace medssm
