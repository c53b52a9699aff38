// Gradients that the heads of a group share, such as those of B and C: sums over these heads.
#pragma once
#include "medssm/heads.h"
#include "medssm/matrix_scan.h"

namespace medssm {
namespace {

struct GroupShape {
  int64_t batch, length, heads, groups, states, threads;  // groups divides heads
};

// The gradient (batch, length, groups, states) of B or of C. If there are few groups and few states, several threads must share a group: its heads
// are then divided into pieces. Each piece has its own sum, and finish() adds the sums up. The number of pieces depends on shapes only, so any number
// of threads gives the same bits.
template <class T> class GroupSum {
 public:
  GroupSum(const GroupShape& p, const HeadOutput& to) :
      p_(p), to_(to), pieces_(pieces(p)), own_(pieces_ > 1 ? p.batch * p.length * p.groups * pieces_ * p.states : 0) {}

  // The number of heads in a piece.
  int64_t heads_per_piece() const { return p_.heads / p_.groups / pieces_; }

  // Adds value(t) of a head to `rows`, the thread's scratch memory [block][step][lane] of the present tile. Called once per head, in the order of the
  // heads. The last head of a piece writes the sum.
  template <class F> void add(const Slot<T>& slot, const Tile& tile, int64_t block, T* rows, const F& value) const {
    T* const sum = rows + block * kTileSteps * W;
    for (int64_t t = 0; t < tile.count; ++t) store(sum + t * W, slot.first_together ? value(t) : load<T>(sum + t * W) + value(t));
    if (!slot.last_together) return;
    const auto value_of = [&](int64_t t) { return load<T>(sum + t * W); };
    write_rows<T>(pieces_ > 1 ? own() : to_, slot.batch, slot.head / heads_per_piece(), block * W, slot.width(block), tile, value_of);
  }

  // Adds up the sums of the pieces.
  void finish() const {
    if (pieces_ == 1) return;
    const Walk raster(p_.length);
    const HeadOutput from = own();
    const int64_t tiles = ceil_div(p_.length, kTileSteps), items = p_.batch * tiles;
    const int64_t threads = useful_threads(p_.threads, items, kTileSteps * p_.groups * pieces_ * p_.states);
    const PerThread<Scratch<T>> memory(threads, [] { return Scratch<T>(2 * kTileSteps * W); });
    parallel(threads, [&](const Team& team) {
      T *const buffer = memory[team.rank].data(), *const sum = buffer + kTileSteps * W;
      const Range mine = share(items, team);
      for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t batch = item / tiles;
        const Tile tile = raster.tile(item % tiles * kTileSteps, p_.length);
        for (int64_t group = 0; group < p_.groups; ++group)
          for (int64_t state = 0; state < p_.states; state += W) {
            const int width = static_cast<int>(least<int64_t>(W, p_.states - state));
            for (int64_t piece = 0; piece < pieces_; ++piece) {
              const View<T> x = rows_of<T>({from.data, from.type, from.batch, from.token, from.head}, batch, group * pieces_ + piece, state, width, W,
                                           tile, buffer);
              for (int64_t t = 0; t < tile.count; ++t) store(sum + t * W, piece ? load<T>(sum + t * W) + load<T>(x[t]) : load<T>(x[t]));
            }
            write_rows<T>(to_, batch, group, state, width, tile, [&](int64_t t) { return load<T>(sum + t * W); });
          }
      }
    });
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kMinSums = 4;  // independent sums wanted, to occupy several threads

  // The number of pieces. It divides the number of heads in a group.
  static int64_t pieces(const GroupShape& p) {
    const int64_t sharing = p.heads / p.groups, sums = p.batch * p.groups * ceil_div(p.states, W);
    int64_t count = least(sharing, ceil_div(kMinSums, most<int64_t>(sums, 1)));
    while (sharing % count) ++count;
    return count;
  }
  HeadOutput own() const {
    const int64_t token = p_.groups * pieces_ * p_.states;
    return {own_.data(), kStorage<T>, p_.length * token, token, p_.states};
  }

  const GroupShape p_;
  const HeadOutput to_;
  const int64_t pieces_;
  const Scratch<T> own_;  // (b, l, g * pieces, n)
};

}  // namespace
}  // namespace medssm
