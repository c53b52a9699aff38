// Selective scan, backward, on a CPU.
//
// The steps are divided into rounds, which are computed from the last to the first. In a round, every item (a block of one batch element) computes
// its gradients and its share of dB and dC, which is the sum over its own channels. After a barrier, the shares are added over the blocks in a fixed
// order. So no gradient needs atomic operations, the scratch memory depends on the size of a round only, and any number of threads gives the same
// bits.
#include "adjoint.h"
#include "medssm/activation.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"

using namespace medssm;

namespace {

struct RowOutput {  // (b, l, g, n) with adjacent states
  void* data;
  int64_t type, batch, token, group;
};
struct Arguments {
  Problem problem;
  Tokens dout;
  const void *dstate, *checkpoints;  // dstate: (b, d, n), may be null; checkpoints: (b, chunks, n, d); both in the compute type
  int64_t checkpoint_batch;
  Output du, ddelta, dz;  // ddelta: (b, l, d) or (b, l, r); dz is used only if there is z
  RowOutput dB, dC;
  void *dA, *dD, *dbias, *dproj, *dinitial;  // contiguous, in the compute type; all except dA may be null
};

template <class T> class Backward {
 public:
  explicit Backward(const Arguments& arguments) :
      a_(arguments),
      p_(arguments.problem),
      walk_(walk_of(p_)),
      blocks_(p_),
      chunk_(chunk_tokens(p_.state)),
      half_(first_half(p_.state)),
      row_(round_up(2 * p_.state + p_.rank, W)),
      sum_((p_.state + p_.rank + 2) * W),
      halved_(p_.batch * blocks_.count < p_.threads && p_.state > 1),
      slots_(halved_ ? 2 : 1),
      batches_(least(p_.batch, ceil_div(4 * p_.threads, blocks_.count))),
      items_(batches_ * blocks_.count),
      round_(least(p_.length, chunk_ * most<int64_t>(1, least(kRound / chunk_, kRoundBytes / (items_ * chunk_ * row_ * int64_t(sizeof(T))))))) {}

  void run() const {
    const int64_t tile_sums = halved_ ? items_ * round_ * (p_.rank + 2) * W : 0, shared = halved_ ? items_ * 2 * 3 * round_ * W : 0;
    const int64_t slots = items_ * slots_, threads = least(p_.threads, slots);
    const Scratch<T> rows(2 * items_ * round_ * row_), sums(items_ * sum_), totals(blocks_.count * sum_), parts(tile_sums), tiles(shared);
    const Scratch<T> memory(slots * slot_size());
    const Scratch<Slot> all(slots);
    const Common common{rows.data(), sums.data(), totals.data(), parts.data(), tiles.data(), memory.data(), all.data()};
    const PerThread<Worker> workers(threads, [&] { return Worker(*this, common); });
    huge_pages(a_.du, p_.channels);
    huge_pages(a_.ddelta, p_.channels);
    huge_pages(a_.dz, p_.channels);
    parallel_phases(threads, [&](PhasedTeam& team) {
      for (int64_t batch = 0; batch < p_.batch; batch += batches_) workers[team.rank].walk(batch, least(batches_, p_.batch - batch), team);
    });
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kRound = 1024, kRoundBytes = 128 << 10;  // limits of a round: steps, and bytes of shares of dB and dC

  // The data that a thread keeps for an item, or for half of its states.
  struct Slot {
    Channels<T> channels;
    T *carry, *starts;  // carry: g [n][lane]; starts: h before each kTile steps of the chunk [..][n][lane]
    int64_t item;       // index among the items of the batch elements that are computed together
    int from, to;       // its halves of the states: [0, 2), or only one of them
  };
  int64_t slot_size() const { return Channels<T>::size(p_) + p_.state * W + chunk_ / kTile * p_.state * W; }

  // Memory that the threads share. A vector has W lanes, one per channel of a block.
  //
  //   rows    two buffers, for alternate rounds, each:   item 0 | item 1 | ...        one row for each step of the round
  //             row:  dB of half 0 | dC of half 0 | dB of half 1 | dC of half 1 | low-rank ddelta
  //   sums    item 0 | item 1 | ...       each:  dA (n vectors) | dproj (r vectors) | dD | dbias
  //   totals  block 0 | block 1 | ...     each as in sums, added over the batch
  //
  // and only if two threads share an item, each with half of its states:
  //
  //   tiles   slot 0 | slot 1 | ...       each:  y | along_A | along_B        one vector for each step of the round
  //   parts   item 0 | item 1 | ...       each, at its tile's first step:  dproj (r vectors) | dD | dbias
  //
  // memory: the slots' pointers (channels, carry, starts) point into it.
  struct Common {
    T *rows, *sums, *totals, *parts, *tiles, *memory;
    Slot* slots;
  };

  // Scratch memory of one thread for the current tile.
  struct Buffers {
    Scratch<T> memory;
    T *s, *su, *slope, *dy, *gate, *u, *dout, *z, *y[2], *along_A[2], *along_B[2], *kept, *B, *C, *low;
    explicit Buffers(const Problem& p) : memory(kTile * ((14 + 2 * kAdjointUnit) * W + 2 * round_up(p.state, W) + round_up(p.rank, W))) {
      T* at = memory.data();
      for (T** tile : {&s, &su, &slope, &dy, &gate, &u, &dout, &z, &y[0], &y[1], &along_A[0], &along_A[1], &along_B[0], &along_B[1]}) {
        *tile = at;
        at += kTile * W;
      }
      kept = at;
      B = kept + kTile * 2 * kAdjointUnit * W;
      C = B + kTile * round_up(p.state, W);
      low = C + kTile * round_up(p.state, W);
    }
  };

  void huge_pages(const Output& out, int64_t channels) const {
    if (out.data && out.token == channels) prefer_huge_pages(out.data, p_.batch * p_.length * channels * element_size(out.type));
  }

  class Worker {
   public:
    Worker(const Backward& backward, const Common& common) :
        b_(backward), a_(backward.a_), p_(backward.p_), common_(common), buffers_(p_), tiles_(b_.chunk_) {}

    // Computes all rounds of `batches` batch elements, beginning with `batch`.
    void walk(int64_t batch, int64_t batches, PhasedTeam& team) {
      const int64_t items = batches * b_.blocks_.count, rounds = ceil_div(p_.length, b_.round_);
      const Range mine = share(items * b_.slots_, team);
      Slot *const first = common_.slots + mine.begin, *const last = common_.slots + mine.end;
      for (int64_t i = mine.begin; i < mine.end; ++i) fill_slot(common_.slots[i], batch, i, common_.memory + i * b_.slot_size());
      for (int64_t round = rounds - 1; round >= 0; --round) {
        const int64_t from = round * b_.round_, end = least(p_.length, from + b_.round_);
        T* rows = common_.rows + round % 2 * b_.items_ * b_.round_ * b_.row_;
        for (Slot* slot = first; slot < last; ++slot) states(*slot, from, end, rows);
        team.barrier();
        if (b_.halved_) {
          for (Slot* slot = first; slot < last; ++slot) outputs_of_halves(*slot, from, end, rows);
          team.barrier();
          for (Slot* slot = first; slot < last; ++slot) add_parts(*slot, from, end);
        }
        add_rows(batch, batches, from, end, rows, team);
      }
      for (Slot* slot = first; slot < last; ++slot) write_initial_gradient(*slot, b_.walk_.first_sequence());
      team.barrier();
      add_sums(batch, batches, team);
      team.barrier();
    }

   private:
    void fill_slot(Slot& slot, int64_t batch, int64_t number, T* memory) {
      slot.item = number / b_.slots_;
      slot.from = b_.halved_ ? number % 2 : 0;
      slot.to = b_.halved_ ? slot.from + 1 : 2;
      Channels<T>& channels = slot.channels;
      channels.load_parameters(p_, b_.blocks_[batch * b_.blocks_.count + slot.item], memory);
      slot.carry = memory + Channels<T>::size(p_);
      slot.starts = slot.carry + p_.state * W;
      channels.load_state(p_, a_.dstate, b_.walk_.last_sequence(), slot.carry);
      const int64_t low = first(slot.from), high = slot.to == 2 ? p_.state + p_.rank + 2 : first(slot.to);
      std::memset(sums(slot) + low * W, 0, sizeof(T) * (high - low) * W);
    }

    int64_t first(int half) const { return half == 0 ? 0 : half == 1 ? b_.half_ : p_.state; }  // the first state of a half
    T* sums(const Slot& slot) const { return common_.sums + slot.item * b_.sum_; }

    // Phase one: walks the recurrence backward over steps [from, end), chunk by chunk from the last. If the slot has both halves, it also writes
    // the outputs.
    void states(Slot& slot, int64_t from, int64_t end, T* rows) {
      for (int64_t chunk = from + (end - 1 - from) / b_.chunk_ * b_.chunk_; chunk >= from; chunk -= b_.chunk_) {
        const int64_t tiles = b_.walk_.aligned_tiles(chunk, least(end, chunk + b_.chunk_), tiles_.data());
        load_starts(slot, chunk, tiles);
        for (int64_t i = tiles - 1; i >= 0; --i) {
          const Tile& tile = tiles_.data()[i];
          const Shared<T> shared = shared_rows<T>(p_, slot.channels.block, tile, buffers_);
          const Inputs<T> in = inputs(slot.channels, tile, shared.low);
          T* row = rows + (slot.item * b_.round_ + tile.from - from) * b_.row_;
          const bool writes = !b_.halved_ || (tile.from - from + kTile) / kTile % 2 == slot.from;
          const Prefetch prefetch = lines(slot.channels.block, tile.from, writes);
          const T* start = slot.starts + (tile.from - chunk) / kTile * p_.state * W;
          if (tile.begins_segment) slot.channels.begin_segment(p_, tile);
          for (int half = slot.from; half < slot.to; ++half) {
            T *y = buffers_.y[half], *along_A = buffers_.along_A[half], *along_B = buffers_.along_B[half];
            if (b_.halved_) {
              y = half_tile(slot, half, 0, tile.from - from);
              along_A = half_tile(slot, half, 1, tile.from - from);
              along_B = half_tile(slot, half, 2, tile.from - from);
            }
            const int64_t n = first(half), count = first(half + 1) - n;
            backward_half<T>({slot.channels.rates + n * W,
                              in.s,
                              in.su,
                              buffers_.dy,
                              {shared.B.rows + n, shared.B.step},
                              {shared.C.rows + n, shared.C.step},
                              tile.count,
                              (tile.begins_segment ? slot.channels.state : start) + n * W,
                              slot.carry + n * W,
                              sums(slot) + n * W,
                              p_.z.data ? y : nullptr,
                              along_A,
                              along_B,
                              true,
                              row + 2 * n,
                              row + 2 * n + count,
                              b_.row_,
                              buffers_.kept,
                              half == slot.from ? &prefetch : nullptr},
                             count, in.bounded);
          }
          if (tile.begins_sequence()) write_initial_gradient(slot, tile.sequence);
          if (tile.begins_segment) slot.channels.load_state(p_, tile.begins_sequence() ? a_.dstate : nullptr, tile.previous, slot.carry);
          if (!b_.halved_) {
            T* tile_sums = sums(slot) + p_.state * W;
            outputs(slot.channels, tile, in, shared.low, buffers_.y, buffers_.along_A, buffers_.along_B, row + 2 * p_.state, tile_sums, true);
          }
        }
      }
    }

    // Computes h before each kTile steps of a chunk. The first is the checkpoint. If a chunk is longer than kTile steps, the others are computed
    // forward from it.
    void load_starts(Slot& slot, int64_t chunk, int64_t tiles) {
      Channels<T>& channels = slot.channels;
      const Block& block = channels.block;
      const T* saved =
          static_cast<const T*>(a_.checkpoints) + block.batch * a_.checkpoint_batch + chunk / b_.chunk_ * p_.state * p_.channels + block.channel;
      for (int64_t n = 0; n < p_.state; ++n) {
        store(slot.starts + n * W, load_part<T>(saved + n * p_.channels, block.lanes));
        if (chunk > 0) __builtin_prefetch(saved + (n - p_.state) * p_.channels);  // the checkpoint that is loaded next
      }
      if (b_.chunk_ == kTile) return;
      std::memcpy(channels.state, slot.starts, sizeof(T) * p_.state * W);
      for (int64_t i = 0; i + 1 < tiles; ++i) {
        const Tile &tile = tiles_.data()[i], &next = tiles_.data()[i + 1];
        if (tile.begins_segment) channels.begin_segment(p_, tile);
        const Shared<T> shared = shared_rows<T>(p_, block, tile, buffers_);
        Inputs<T> in{{}, buffers_.s, buffers_.su, nullptr, true};
        prepare<T>(p_, channels, tile, shared.low, buffers_.u, &in);
        for (int half = slot.from; half < slot.to; ++half)
          if (first(half) < first(half + 1)) advance_half<T>(p_, channels, in, shared.B, shared.C, tile.count, half, buffers_.y[half], nullptr);
        if (!next.begins_segment) std::memcpy(slot.starts + (next.from - chunk) / kTile * p_.state * W, channels.state, sizeof(T) * p_.state * W);
      }
    }

    // Returns s, s u and the slope of a tile. Stores dy = dout scale silu(z) and gate = dout scale silu'(z) in buffers_.
    Inputs<T> inputs(const Channels<T>& channels, const Tile& tile, const View<T>& low) {
      Inputs<T> in{{}, buffers_.s, buffers_.su, buffers_.slope, true};
      prepare<T>(p_, channels, tile, low, buffers_.u, &in);
      const View<T> dout = block_view<T>(a_.dout, channels.block, tile, buffers_.dout);
      const Vec<T> scale = splat(static_cast<T>(p_.scale));
      if (p_.z.data) {
        const View<T> z = block_view<T>(p_.z, channels.block, tile, buffers_.z);
        for (int64_t t = 0; t < tile.count; ++t) {
          const Silu<T> gate = silu_and_slope<T>(load<T>(z[t]));
          const Vec<T> scaled = load<T>(dout[t]) * scale;
          store(buffers_.dy + t * W, scaled * gate.value);
          store(buffers_.gate + t * W, scaled * gate.slope);
        }
      } else {
        for (int64_t t = 0; t < tile.count; ++t) store(buffers_.dy + t * W, load<T>(dout[t]) * scale);
      }
      return in;
    }

    // Combines both halves and writes du, ddelta and dz. Also computes this tile's part of dproj, dD and dbias: if `add`, adds it to `parts`;
    // otherwise stores it there.
    void outputs(const Channels<T>& channels, const Tile& tile, const Inputs<T>& in, const View<T>& low, T* const* y, T* const* along_A,
                 T* const* along_B, T* low_row, T* parts, bool add) {
      const Block& block = channels.block;
      const int64_t second = p_.state > 1;  // with one state the second half is empty, and its tiles have no values
      const Vec<T> D = channels.D;
      const auto both = [&](T* const* halves, int64_t t) {
        const Vec<T> sum = load<T>(halves[0] + t * W);
        return second ? sum + load<T>(halves[1] + t * W) : sum;
      };
      const bool gated = p_.z.data;
      Vec<T> dD{}, dbias{};
      struct Gradients {
        Vec<T> u, s, z;
      };
      const auto gradients = [&](int64_t t) -> Gradients {
        const Vec<T> u = load<T>(in.u[t]), dy = load<T>(buffers_.dy + t * W), of_B = both(along_B, t);
        const Vec<T> ds = fma(u, of_B, both(along_A, t) * static_cast<T>(kLn2)) * load<T>(in.slope + t * W);
        Vec<T> du = fma(load<T>(in.s + t * W), of_B, D * dy), dz{};
        if (gated) dz = fma(D, u, both(y, t)) * load<T>(buffers_.gate + t * W);
        if (gated && a_.dz.earlier) dz += earlier<T>(a_.dz, block, tile, t);
        if (a_.du.earlier) du += earlier<T>(a_.du, block, tile, t);
        dD = fma(dy, u, dD);
        dbias += ds;
        return {du, ds, dz};
      };
      if (block.lanes == W && !p_.rank && a_.du.type == a_.ddelta.type && (!gated || a_.du.type == a_.dz.type)) {
        with_storage(a_.du.type, a_.du.data, [&](auto* du) {
          auto *ddelta = static_cast<decltype(du)>(a_.ddelta.data), *dz = static_cast<decltype(du)>(a_.dz.data);
          for (int64_t t = 0; t < tile.count; ++t) {
            const Gradients g = gradients(t);
            store(du + offset(a_.du, block, tile, t), g.u);
            store(ddelta + offset(a_.ddelta, block, tile, t), g.s);
            if (gated) store(dz + offset(a_.dz, block, tile, t), g.z);
          }
        });
      } else {  // the results are first stored in tiles that are no longer needed
        for (int64_t t = 0; t < tile.count; ++t) {
          const Gradients g = gradients(t);
          store(in.s + t * W, g.u);
          store(in.slope + t * W, g.s);
          store(buffers_.gate + t * W, g.z);
        }
        write<T>(a_.du, block, tile, [&](int64_t t) { return load<T>(in.s + t * W); });
        if (!p_.rank) write<T>(a_.ddelta, block, tile, [&](int64_t t) { return load<T>(in.slope + t * W); });
        if (gated) write<T>(a_.dz, block, tile, [&](int64_t t) { return load<T>(buffers_.gate + t * W); });
      }
      if (p_.rank) expand_adjoint(channels, tile, low, in.slope, low_row, parts, add);
      T* last = parts + p_.rank * W;
      store(last, add ? load<T>(last) + dD : dD);
      store(last + W, add ? load<T>(last + W) + dbias : dbias);
    }

    // The adjoint of delta = (low-rank delta) delta_proj^T: this block's share of the gradient of the low-rank delta, and dproj.
    void expand_adjoint(const Channels<T>& channels, const Tile& tile, const View<T>& low, const T* ds, T* low_row, T* parts, bool add) {
      constexpr int kColumns = least(4, W);
      for (int64_t r = 0; r < p_.rank; r += kColumns) {
        const int columns = static_cast<int>(least<int64_t>(kColumns, p_.rank - r));
        Vec<T> proj[kColumns], dproj[kColumns];
        for (int i = 0; i < kColumns; ++i) {
          proj[i] = i < columns ? load<T>(channels.proj + (r + i) * W) : Vec<T>{};
          dproj[i] = Vec<T>{};
        }
        for (int64_t t = 0; t < tile.count; ++t) {
          const Vec<T> gradient = load<T>(ds + t * W);
          Vec<T> shares[kColumns];
          for (int i = 0; i < kColumns; ++i) {
            shares[i] = gradient * proj[i];
            dproj[i] = fma(gradient, splat(low[t][r + (i < columns ? i : 0)]), dproj[i]);
          }
          store_part(low_row + t * b_.row_ + r, sum_each<T, kColumns>(shares), columns);
        }
        for (int i = 0; i < columns; ++i) {
          T* to = parts + (r + i) * W;
          store(to, add ? load<T>(to) + dproj[i] : dproj[i]);
        }
      }
    }

    // Phase two if two threads share an item: each thread writes the outputs of every second tile.
    void outputs_of_halves(Slot& slot, int64_t from, int64_t end, T* rows) {
      int64_t number = 0;
      for (int64_t at = from; at < end; ++number) {
        const Tile tile = b_.walk_.aligned_tile(at, end);
        if (number % 2 == slot.from) {
          const Shared<T> shared = shared_rows<T>(p_, slot.channels.block, tile, buffers_);
          const Inputs<T> in = inputs(slot.channels, tile, shared.low);
          T *y[2], *along_A[2], *along_B[2];
          for (int half = 0; half < 2; ++half) {
            y[half] = half_tile(slot, half, 0, at - from);
            along_A[half] = half_tile(slot, half, 1, at - from);
            along_B[half] = half_tile(slot, half, 2, at - from);
          }
          T* low_row = rows + (slot.item * b_.round_ + at - from) * b_.row_ + 2 * p_.state;
          outputs(slot.channels, tile, in, shared.low, y, along_A, along_B, low_row, part(slot, at - from), false);
        }
        at += tile.count;
      }
    }

    // Phase three if two threads share an item: adds the parts of the tiles, in the same order as a single thread does.
    void add_parts(const Slot& slot, int64_t from, int64_t end) {
      if (slot.from != 0) return;
      T* total = sums(slot) + p_.state * W;
      for (int64_t chunk = from + (end - 1 - from) / b_.chunk_ * b_.chunk_; chunk >= from; chunk -= b_.chunk_) {
        const int64_t tiles = b_.walk_.aligned_tiles(chunk, least(end, chunk + b_.chunk_), tiles_.data());
        for (int64_t i = tiles - 1; i >= 0; --i) {
          const T* one = part(slot, tiles_.data()[i].from - from);
          for (int64_t v = 0; v < (p_.rank + 2) * W; v += W) store(total + v, load<T>(total + v) + load<T>(one + v));
        }
      }
    }

    T* half_tile(const Slot& slot, int half, int which, int64_t step) const {
      return common_.tiles + (((slot.item * 2 + half) * 3 + which) * b_.round_ + step) * W;
    }
    T* part(const Slot& slot, int64_t step) const { return common_.parts + (slot.item * b_.round_ + step) * (p_.rank + 2) * W; }

    // Writes dB, dC and the gradient of the low-rank delta for steps [from, end): adds the shares of the blocks in the order of the blocks.
    void add_rows(int64_t batch, int64_t batches, int64_t from, int64_t end, const T* rows, const Team& team) {
      const Range mine = share(batches * (end - from), team);
      for (int64_t at = mine.begin; at < mine.end; ++at) {
        const int64_t b = at / (end - from), step = at % (end - from), token = b_.walk_.steps(from + step, end).token(0);
        const T* item = rows + (b * b_.blocks_.count * b_.round_ + step) * b_.row_;
        T* low = buffers_.low;
        for (int64_t group = 0; group < p_.groups; ++group) {
          T* sum = buffers_.kept;
          add_blocks(item + group * b_.blocks_.per_group * b_.round_ * b_.row_, b_.blocks_.per_group, 0, 2 * p_.state, sum);
          const int64_t half = b_.half_, rest = p_.state - half;
          write_row(a_.dB, batch + b, token, group, 0, half, sum);
          write_row(a_.dC, batch + b, token, group, 0, half, sum + half);
          write_row(a_.dB, batch + b, token, group, half, rest, sum + 2 * half);
          write_row(a_.dC, batch + b, token, group, half, rest, sum + 2 * half + rest);
        }
        if (p_.rank) {
          add_blocks(item, b_.blocks_.count, 2 * p_.state, p_.rank, low);
          const Output& out = a_.ddelta;
          write_row({out.data, out.type, out.batch, out.token, 0}, batch + b, token, 0, 0, p_.rank, low);
        }
      }
    }

    // sum[0, columns) = the sum over blocks of columns [column, column + columns) of their rows.
    void add_blocks(const T* rows, int64_t blocks, int64_t column, int64_t columns, T* sum) const {
      const int64_t step = b_.round_ * b_.row_;
      for (int64_t c = 0; c < columns; c += W) {
        const int lanes = static_cast<int>(least<int64_t>(W, columns - c));
        const T* at = rows + column + c;
        Vec<T> total = load_part<T>(at, lanes);
        for (int64_t block = 1; block < blocks; ++block) total += load_part<T>(at + block * step, lanes);
        store(sum + c, total);
      }
    }

    void write_row(const RowOutput& out, int64_t batch, int64_t token, int64_t group, int64_t column, int64_t columns, const T* row) const {
      with_storage(out.type, out.data, [&](auto* data) {
        auto* to = data + batch * out.batch + token * out.token + group * out.group + column;
        for (int64_t c = 0; c < columns; c += W) {
          const int lanes = static_cast<int>(least<int64_t>(W, columns - c));
          store_part(to + c, load_part<T>(row + c, lanes), lanes);
        }
      });
    }

    void write_initial_gradient(const Slot& slot, int64_t sequence) const {
      if (!a_.dinitial) return;
      const int64_t row = slot.channels.state_row(p_, sequence);
      store_weights<T>(slot.carry, a_.dinitial, row, slot.channels.block.lanes, p_.state, first(slot.from), first(slot.to));
    }

    // Gradients of the weights: adds the items of each block in the order of the batch. Writes them after the last batch element.
    void add_sums(int64_t batch, int64_t batches, const Team& team) const {
      const Range mine = share(b_.blocks_.count, team);
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        T* total = common_.totals + block * b_.sum_;
        for (int64_t b = 0; b < batches; ++b) {
          const T* one = common_.sums + (b * b_.blocks_.count + block) * b_.sum_;
          for (int64_t v = 0; v < b_.sum_; v += W) store(total + v, batch + b ? load<T>(total + v) + load<T>(one + v) : load<T>(one + v));
        }
        if (batch + batches < p_.batch) continue;
        const Block at = b_.blocks_[block];
        const T *dproj = total + p_.state * W, *dD = dproj + p_.rank * W;
        store_weights<T>(total, a_.dA, at.channel, at.lanes, p_.state, 0, p_.state);
        if (p_.rank) store_weights<T>(dproj, a_.dproj, at.channel, at.lanes, p_.rank, 0, p_.rank);
        if (a_.dD) store_weights<T>(dD, a_.dD, at.channel, at.lanes, 1, 0, 1);
        if (a_.dbias) store_weights<T>(dD + W, a_.dbias, at.channel, at.lanes, 1, 0, 1);
      }
    }

    // The cache lines of the kTile steps before `end`. writes: whether this thread will write the gradients of these steps.
    Prefetch lines(const Block& block, int64_t end, bool writes) const {
      Prefetch prefetch(b_.walk_.steps(most<int64_t>(0, end - kTile), end));
      prefetch.add(p_.u, block);
      if (!p_.rank) prefetch.add(p_.delta, block);
      prefetch.add(p_.z, block);
      prefetch.add(a_.dout, block);
      if (!writes) return prefetch;
      prefetch.add(a_.du, block);
      if (!p_.rank) prefetch.add(a_.ddelta, block);
      prefetch.add(a_.dz, block);
      return prefetch;
    }

    const Backward& b_;
    const Arguments& a_;
    const Problem& p_;
    const Common common_;
    const Buffers buffers_;
    const Scratch<Tile> tiles_;
  };

  const Arguments& a_;
  const Problem& p_;
  const Walk walk_;
  const Blocks<T> blocks_;
  const int64_t chunk_, half_, row_, sum_;
  const bool halved_;
  const int64_t slots_, batches_, items_, round_;
};

}  // namespace

MEDSSM_EXPORT(selective_scan_backward, Arguments) { a.problem.wide ? Backward<double>(a).run() : Backward<float>(a).run(); }
