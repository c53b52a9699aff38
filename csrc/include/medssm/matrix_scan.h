// Runs a pass of a matrix-state op over a whole walk. `scan` divides the heads among the threads and stores their states. For each tile it gets the
// operands from the pass, runs the recurrence of matrix_state.h on them, and gives the result to the pass.
//
// An op defines its pass as a class. `scan` makes one object of it per thread:
//
//   struct Pass {
//     using Form = Form<Decay::kWhole, false, false>;              // matrix_state.h
//     void begin_head(const Slot<T>&);                             // before a head's first tile
//     void begin_tile(const Slot<T>&, const Tile&);                // before each tile; slot.state is the state before its first step
//     Operands<T> rows(const Slot<T>&, const Tile&);               // q, k and the decay (unless kLanes) of a tile, padded_rows(rows) elements;
//                                                                  // called once per tile; the views stay valid until the next call
//     void lanes(const Slot<T>&, const Tile&, int64_t block, Operands<T>*);   // v of a block of lanes, and the decay if kLanes
//     void take(const Slot<T>&, const Tile&, int64_t block, const Operands<T>&, const T* o);   // receives the result o [step][lane]
//     void end_head(const Slot<T>&);                               // after a head's last tile
//   };
//
// Views may point into tensors (rows_of) or into buffers of the pass. Buffers hold kTileSteps rows.
//
// `together` is the number of consecutive heads that share an output (the gradients of grouped keys and values). Within each tile the slots of these
// heads follow one another. The first has slot.first_together, the last has slot.last_together. So the pass can add their results, always in the
// order of the heads.
//
// If there are fewer heads than threads, several threads share the blocks of lanes of one head. A pass must compute each block independently of the
// other blocks of its thread, so that any number of threads gives the same bits.
#pragma once
#include <type_traits>

#include "medssm/matrix_state.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"

namespace medssm {
namespace {

// States (b, h, rows, lanes) of any type, with adjacent lanes or adjacent rows. With packed sequences b is their number. If data is null, an initial
// state is zero, and a final state is not stored.
struct StateTensor {
  void* data;
  int64_t type, batch, head, row, lane;
};

struct MatrixShape {
  int64_t batch, heads, together, rows, lanes;  // together: number of consecutive heads that share outputs; heads is a multiple of it
};

// A thread's part of one head of one batch element: some blocks of its lanes.
template <class T> struct Slot {
  int64_t batch, head, first_block, end_block;
  bool first_together, last_together;
  T *states, *carry;  // states: [block of this slot][padded row][lane]; carry: values of the pass itself, zero at the start
  int64_t rows, lanes;

  T* state(int64_t block) const { return states + (block - first_block) * padded_rows(rows) * kLanes<T>; }
  int width(int64_t block) const {
    return static_cast<int>(least<int64_t>(kLanes<T>, lanes - block * kLanes<T>));
  }  // number of lanes of a block that exist
};

// Calls f(row, rows, lanes) for each square of a block of a state: kLanes rows, or those that are left, of the lanes that exist.
template <class T, class F> void each_square(const Slot<T>& slot, int64_t block, const F& f) {
  for (int64_t r = 0; r < slot.rows; r += kLanes<T>) f(r, static_cast<int>(least<int64_t>(kLanes<T>, slot.rows - r)), slot.width(block));
}

// Reads a block of a state; returns `state`.
template <class T> const T* load_state(const StateTensor& from, int64_t sequence, const Slot<T>& slot, int64_t block, T* state) {
  constexpr int W = kLanes<T>;
  with_storage(from.type, from.data, [&](const auto* data) {
    data += (slot.batch + sequence) * from.batch + slot.head * from.head + block * W * from.lane;
    if (from.lane == 1) {
      for (int64_t r = 0; r < slot.rows; ++r) store(state + r * W, load_part<T>(data + r * from.row, slot.width(block)));
    } else {
      each_square<T>(slot, block, [&](int64_t r, int rows, int lanes) {
        Vec<T> square[W];
        for (int i = 0; i < W; ++i) square[i] = i < lanes ? load_part<T>(data + i * from.lane + r, rows) : Vec<T>{};
        transpose<T>(square);
        for (int i = 0; i < rows; ++i) store(state + (r + i) * W, square[i]);
      });
    }
  });
  return state;
}
template <class T> void store_state(const T* state, const StateTensor& to, int64_t sequence, const Slot<T>& slot, int64_t block) {
  constexpr int W = kLanes<T>;
  with_storage(to.type, to.data, [&](auto* data) {
    data += (slot.batch + sequence) * to.batch + slot.head * to.head + block * W * to.lane;
    if (to.lane == 1) {
      for (int64_t r = 0; r < slot.rows; ++r) store_part(data + r * to.row, load<T>(state + r * W), slot.width(block));
    } else {
      each_square<T>(slot, block, [&](int64_t r, int rows, int lanes) {
        Vec<T> square[W];
        for (int i = 0; i < W; ++i) square[i] = i < rows ? load<T>(state + (r + i) * W) : Vec<T>{};
        transpose<T>(square);
        for (int i = 0; i < lanes; ++i) store_part(data + i * to.lane + r, square[i], rows);
      });
    }
  });
}

template <class T> void load_states(const StateTensor& from, int64_t sequence, const Slot<T>& slot) {
  for (int64_t block = slot.first_block; from.data && block < slot.end_block; ++block) load_state(from, sequence, slot, block, slot.state(block));
}
template <class T> void store_states(const Slot<T>& slot, const StateTensor& to, int64_t sequence) {
  for (int64_t block = slot.first_block; to.data && block < slot.end_block; ++block) store_state(slot.state(block), to, sequence, slot, block);
}

// A block of the slot's state times the same block of another one, summed over the rows.
template <class T> Vec<T> sum_of_products(const Slot<T>& slot, int64_t block, const T* other) {
  const T* state = slot.state(block);
  Vec<T> sum{};
  for (int64_t r = 0; r < slot.rows; ++r) sum = fma(load<T>(state + r * kLanes<T>), load<T>(other + r * kLanes<T>), sum);
  return sum;
}

// Extra positions at which a tile must begin: each step for which step - offset is a multiple of `every`. every = 0: none.
struct Cuts {
  int64_t every, offset;
  int64_t next(int64_t from, int64_t length) const { return every ? least(length, from + every - (from + every - offset % every) % every) : length; }
};

// Runs a pass. make() returns the pass object of one thread. carry: how many values a pass keeps for itself per slot and block.
template <class T, class Make> void scan(const MatrixShape& shape, const Walk& walk, int64_t length, int64_t threads, const StateTensor& initial,
                                         const StateTensor& final, const Cuts& cuts, int64_t carry, const Make& make) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kBand = 16;  // heads that a thread computes together: adjacent in memory, and few enough for the second-level cache
  constexpr int64_t kMinWorkPerThread = 1 << 20;  // in products; starting a thread takes as long as a few hundred thousand of them
  using Pass = decltype(make());
  const int64_t items = shape.batch * (shape.heads / shape.together), blocks = ceil_div(shape.lanes, W);
  if (items == 0 || blocks == 0) return;
  threads = least(threads, ceil_div(items * shape.together * length * shape.rows * shape.lanes, kMinWorkPerThread));
  const int64_t parts = items >= threads ? 1 : least(blocks, ceil_div(threads, items));
  const int64_t at_once = most<int64_t>(1, kBand / shape.together) * shape.together;
  const int64_t per_block = padded_rows(shape.rows) * W, most_blocks = ceil_div(blocks, parts);
  struct Own {
    Pass pass;
    Scratch<Slot<T>> slots;
    Scratch<T> memory, o;
  };
  threads = least(threads, items * parts);
  const PerThread<Own> own_of(threads, [&] {
    return Own{make(), Scratch<Slot<T>>(at_once), Scratch<T>(at_once * most_blocks * (per_block + carry)), Scratch<T>(kTileSteps * W)};
  });
  parallel(threads, [&](const Team& team) {
    auto& [pass, slots, memory, o] = own_of[team.rank];
    const Range mine = share(items * parts, team);
    for (int64_t unit = mine.begin; unit < mine.end;) {
      int64_t count = 0;
      for (; unit < mine.end && count < at_once; ++unit) {
        const int64_t item = unit / parts, part = unit % parts, first_head = item % (shape.heads / shape.together) * shape.together;
        for (int64_t i = 0; i < shape.together; ++i, ++count) {
          T* own = memory.data() + count * most_blocks * (per_block + carry);
          slots.data()[count] = {item / (shape.heads / shape.together),
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
        load_states(initial, walk.first_sequence(), slots.data()[i]);
        pass.begin_head(slots.data()[i]);
      }
      for (int64_t from = 0; from < length;) {
        const Tile tile = walk.tile(from, cuts.next(from, length));
        for (int64_t i = 0; i < count; ++i) {
          const Slot<T>& slot = slots.data()[i];
          if (tile.begins_segment) {
            if (tile.begins_sequence()) store_states(slot, final, tile.previous);
            std::memset(slot.states, 0, sizeof(T) * static_cast<std::size_t>((slot.end_block - slot.first_block) * per_block));
            if (tile.begins_sequence()) load_states(initial, tile.sequence, slot);
          }
          pass.begin_tile(slot, tile);
          Operands<T> in = pass.rows(slot, tile);
          in.count = tile.count;
          for (int64_t block = slot.first_block; block < slot.end_block; ++block) {
            pass.lanes(slot, tile, block, &in);
            advance<T, typename Pass::Form>(in, padded_rows(shape.rows), slot.state(block), o.data());
            pass.take(slot, tile, block, in, o.data());
          }
        }
        from += tile.count;
      }
      for (int64_t i = 0; i < count; ++i) {
        pass.end_head(slots.data()[i]);
        store_states(slots.data()[i], final, walk.last_sequence());
      }
    }
  });
}

}  // namespace
}  // namespace medssm
