// The walk of a recurrence through the tokens, in tiles.
//
// A tile is a run of at most kTileSteps steps of the walk that no segment start interrupts.
#pragma once
#include "medssm/storage.h"

namespace medssm {
namespace {

constexpr int64_t kTileSteps = 64;

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
  // index: the token of each step, null for raster. starts: the sorted steps at which the state begins anew, in the walk that is not turned
  // round. reverse: the same walk backwards.
  Walk(int64_t length, const int64_t* index, const int64_t* starts, int64_t start_count, bool reverse) :
      length_(length), index_(index), starts_(starts), start_count_(start_count), reverse_(reverse) {}

  // Steps [from, end), a segment start or not: for a prefetch.
  Tile steps(int64_t from, int64_t end) const { return {from, end - from, false, index_, reverse_ ? length_ - 1 - from : from, reverse_ ? -1 : 1}; }

  // The tile that begins at `from`, ending before `end`, the next multiple of kTileSteps and the next start.
  Tile tile(int64_t from, int64_t end) const {
    end = least(least(end, length_), round_up(from + 1, kTileSteps));
    const int64_t next = first_start(from);
    const bool fresh = from > 0 && next < start_count_ && start(next) == from;
    if (next + fresh < start_count_) end = least(end, start(next + fresh));
    Tile tile = steps(from, end);
    tile.fresh = fresh;
    return tile;
  }

  // The tiles of steps [from, end), into `tiles` (end - from of them at most); returns how many.
  int64_t tiles(int64_t from, int64_t end, Tile* tiles) const {
    int64_t count = 0;
    for (end = least(end, length_); from < end; from += tiles[count++].count) tiles[count] = tile(from, end);
    return count;
  }

 private:
  // The i-th step at which a segment begins; turned round with the walk. Step 0 and the end of the walk are not among them in effect:
  // the initial state precedes step 0.
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
