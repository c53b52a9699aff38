// A matrix-state pass over a whole walk: which thread takes which heads, the states of all heads, and tile after tile the recurrence of
// matrix_state.h between what the pass reads and what it makes of the result.
//
// An op writes its pass as a class; `scan` makes one object of it per thread:
//
//   struct Pass {
//     using Form = Form<Decay::kWhole, false, false>;              // matrix_state.h
//     void enter(const Seat<T>&);                                  // before a head's first tile
//     void begin(const Seat<T>&, const Tile&);                     // before each tile; seat.state is as the steps before left it
//     Operands<T> rows(const Seat<T>&, const Tile&);               // q, k and the decay (not kLanes) of a head's tile, padded_rows(rows) wide;
//                                                                  // called once a tile, the views stay valid until the next call
//     void lanes(const Seat<T>&, const Tile&, int64_t block, Operands<T>*);   // v of a block of lanes, and the decay of kLanes
//     void take(const Seat<T>&, const Tile&, int64_t block, const Operands<T>&, const T* o);   // o [step][lane]: to scale, to add to, to write
//     void leave(const Seat<T>&);                                  // after a head's last tile
//   };
//
// Views may point into tensors (rows_of) or into buffers of the pass; in between, a pass computes what it likes: feature maps, gates, steps.
// Buffers hold kTileSteps rows. Heads that share an output (the gradients of grouped keys and values) are `together`: their seats follow one
// another within each tile, seat.first_together to seat.last_together, so that the pass can add their results up, always in the order of the heads.
//
// A pass must compute each block of lanes independently of which other blocks its thread has: threads share a head's blocks where heads are
// too few. Then any number of threads gives the same bits.
#pragma once
#include <type_traits>

#include "medssm/matrix_state.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"

namespace medssm {
namespace {

// A state (b, h, rows, lanes) of any type and strides. data may be null: zeros, or not wanted.
struct StateTensor {
  void* data;
  int64_t type, batch, head, row, lane;
};

struct MatrixShape {
  int64_t batch, heads, together, rows, lanes;  // together: consecutive heads that share outputs; divides heads
};

// One head of one batch element, and a thread's blocks of its lanes.
template <class T> struct Seat {
  int64_t batch, head, first_block, end_block;
  bool first_together, last_together;
  T *states, *carry;  // [block of this seat][padded row][lane]; the pass's own numbers, zeros at first
  int64_t rows, lanes;

  T* state(int64_t block) const { return states + (block - first_block) * padded_rows(rows) * kLanes<T>; }
  int width(int64_t block) const { return static_cast<int>(least<int64_t>(kLanes<T>, lanes - block * kLanes<T>)); }  // lanes that exist
};

template <class T> void load_states(const StateTensor& from, const Seat<T>& seat) {
  if (!from.data) return;
  with_storage(from.type, from.data, [&](const auto* data) {
    data += seat.batch * from.batch + seat.head * from.head;
    for (int64_t block = seat.first_block; block < seat.end_block; ++block)
      for (int64_t r = 0; r < seat.rows; ++r)
        for (int lane = 0; lane < seat.width(block); ++lane)
          seat.state(block)[r * kLanes<T> + lane] = to_compute<T>(data[r * from.row + (block * kLanes<T> + lane) * from.lane]);
  });
}

template <class T> void store_states(const Seat<T>& seat, const StateTensor& to) {
  if (!to.data) return;
  with_storage(to.type, to.data, [&](auto* data) {
    using S = std::remove_reference_t<decltype(*data)>;
    data += seat.batch * to.batch + seat.head * to.head;
    for (int64_t block = seat.first_block; block < seat.end_block; ++block)
      for (int64_t r = 0; r < seat.rows; ++r)
        for (int lane = 0; lane < seat.width(block); ++lane)
          data[r * to.row + (block * kLanes<T> + lane) * to.lane] = to_storage<S>(seat.state(block)[r * kLanes<T> + lane]);
  });
}

// How a walk is cut beyond its tiles: where steps - offset is a multiple of `every`, a tile begins. 0: nowhere.
struct Cuts {
  int64_t every, offset;
  int64_t next(int64_t from, int64_t length) const { return every ? least(length, from + every - (from + every - offset % every) % every) : length; }
};

// Runs a pass. make(): a pass, for one thread. carry: how many numbers of its own a pass keeps per seat and block.
template <class T, class Make> void scan(const MatrixShape& shape, const Walk& walk, int64_t length, int64_t threads, const StateTensor& initial,
                                         const StateTensor& final, const Cuts& cuts, int64_t carry, const Make& make) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kBand = 16;        // heads that walk together: neighbours in memory, their states stay in the second-level cache
  constexpr int64_t kWorth = 1 << 20;  // products of a thread's share: starting it costs as much as some hundred thousand
  using Pass = decltype(make());
  const int64_t items = shape.batch * (shape.heads / shape.together), blocks = ceil_div(shape.lanes, W);
  if (items == 0 || blocks == 0) return;
  threads = least(threads, ceil_div(items * shape.together * length * shape.rows * shape.lanes, kWorth));
  const int64_t parts = items >= threads ? 1 : least(blocks, ceil_div(threads, items));
  const int64_t at_once = most<int64_t>(1, kBand / shape.together) * shape.together;
  const int64_t per_block = padded_rows(shape.rows) * W, most_blocks = ceil_div(blocks, parts);
  struct Own {
    Pass pass;
    Scratch<Seat<T>> seats;
    Scratch<T> memory, o;
  };
  threads = least(threads, items * parts);
  const PerThread<Own> own_of(threads, [&] {
    return Own{make(), Scratch<Seat<T>>(at_once), Scratch<T>(at_once * most_blocks * (per_block + carry)), Scratch<T>(kTileSteps * W)};
  });
  parallel(threads, [&](const Team& team) {
    auto& [pass, seats, memory, o] = own_of[team.rank];
    const Range mine = share(items * parts, team);
    for (int64_t unit = mine.begin; unit < mine.end;) {
      int64_t count = 0;
      for (; unit < mine.end && count < at_once; ++unit) {
        const int64_t item = unit / parts, part = unit % parts, first_head = item % (shape.heads / shape.together) * shape.together;
        for (int64_t i = 0; i < shape.together; ++i, ++count) {
          T* own = memory.data() + count * most_blocks * (per_block + carry);
          seats.data()[count] = {item / (shape.heads / shape.together),
                                 first_head + i,
                                 part * blocks / parts,
                                 (part + 1) * blocks / parts,
                                 i == 0,
                                 i + 1 == shape.together,
                                 own,
                                 own + most_blocks * per_block,
                                 shape.rows,
                                 shape.lanes};
        }
      }
      std::memset(memory.data(), 0, sizeof(T) * static_cast<std::size_t>(count * most_blocks * (per_block + carry)));
      for (int64_t i = 0; i < count; ++i) {
        load_states(initial, seats.data()[i]);
        pass.enter(seats.data()[i]);
      }
      for (int64_t from = 0; from < length;) {
        const Tile tile = walk.tile(from, cuts.next(from, length));
        for (int64_t i = 0; i < count; ++i) {
          const Seat<T>& seat = seats.data()[i];
          if (tile.fresh) std::memset(seat.states, 0, sizeof(T) * static_cast<std::size_t>((seat.end_block - seat.first_block) * per_block));
          pass.begin(seat, tile);
          Operands<T> in = pass.rows(seat, tile);
          in.count = tile.count;
          for (int64_t block = seat.first_block; block < seat.end_block; ++block) {
            pass.lanes(seat, tile, block, &in);
            advance<T, typename Pass::Form>(in, padded_rows(shape.rows), seat.state(block), o.data());
            pass.take(seat, tile, block, in, o.data());
          }
        }
        from += tile.count;
      }
      for (int64_t i = 0; i < count; ++i) {
        pass.leave(seats.data()[i]);
        store_states(seats.data()[i], final);
      }
    }
  });
}

}  // namespace
}  // namespace medssm
