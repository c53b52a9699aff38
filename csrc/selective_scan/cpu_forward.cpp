// Selective scan, forward, on a CPU.
//
// A thread advances all of its blocks over one tile of steps before it starts the next tile. This is fast because the blocks of a token are in the
// same memory pages, and blocks of the same group read the same rows of B and C. Softplus, D, the gate and type conversions work on tiles that stay
// in the first-level cache.
#include "medssm/activation.h"
#include "medssm/parallel.h"
#include "medssm/scratch.h"
#include "recurrence.h"

using namespace medssm;

namespace {

struct Arguments {
  Problem problem;
  Output out;
  void *state, *checkpoints;  // (b, d, n), where b is the number of packed sequences, if there are any; (b, chunks, n, d). Both in the
                              // compute type; may be null
  int64_t checkpoint_batch;
};

template <class T> class Forward {
 public:
  explicit Forward(const Arguments& arguments) :
      a_(arguments), p_(arguments.problem), walk_(walk_of(p_)), blocks_(p_), chunk_(chunk_tokens(p_.state)) {}

  void run() const {
    const int64_t items = p_.batch * blocks_.count;
    if (items == 0) return;
    if (a_.out.token == p_.channels) prefer_huge_pages(a_.out.data, p_.batch * p_.length * p_.channels * element_size(a_.out.type));
    if (items < p_.threads && p_.state > 1) return halves(items);
    const int64_t threads = most<int64_t>(1, least(p_.threads, items)), most_blocks = least(kMaxBlocks, ceil_div(items, threads));
    const PerThread<Buffers> own(threads, [&] { return Buffers(p_, most_blocks); });
    parallel(threads, [&](const Team& team) {
      const Range mine = share(items, team);
      for (int64_t item = mine.begin; item < mine.end;) {
        const int64_t end_of_batch = (item / blocks_.count + 1) * blocks_.count;
        const int64_t count = least(least(mine.end, end_of_batch) - item, most_blocks);
        run_blocks(item, count, own[team.rank]);
        item += count;
      }
    });
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kMaxBlocks = 16;  // blocks that are advanced together: few enough that their states stay in the second-level cache
  static constexpr int64_t kRound = 1024;    // steps between two barriers when two threads share a block; a multiple of the chunk size

  // Scratch memory of one thread: tiles, and the parameters and states of `blocks` blocks.
  struct Buffers {
    Scratch<T> memory;
    T *s, *su, *u, *z, *y[2], *B, *C, *low, *channels;
    Buffers(const Problem& p, int64_t blocks) :
        memory(kTile * (6 * W + 2 * round_up(p.state, W) + round_up(p.rank, W)) + blocks * Channels<T>::size(p)) {
      T* at = memory.data();
      for (T** tile : {&s, &su, &u, &z, &y[0], &y[1]}) {
        *tile = at;
        at += kTile * W;
      }
      B = at;
      C = B + kTile * round_up(p.state, W);
      low = C + kTile * round_up(p.state, W);
      channels = low + kTile * round_up(p.rank, W);
    }
  };

  // Runs `count` blocks of one batch element over the whole walk.
  void run_blocks(int64_t item, int64_t count, const Buffers& buffers) const {
    Channels<T> channels[kMaxBlocks];
    for (int64_t i = 0; i < count; ++i) {
      channels[i].load_parameters(p_, blocks_[item + i], buffers.channels + i * Channels<T>::size(p_));
      channels[i].load_state(p_, p_.initial, walk_.first_sequence(), channels[i].state);
    }
    for (int64_t from = 0; from < p_.length;) {
      const Tile tile = tile_at(from, p_.length), next = ahead(tile);
      Shared<T> rows{};
      for (int64_t i = 0; i < count; ++i) {
        Channels<T>& mine = channels[i];
        if (i == 0 || mine.block.group != channels[i - 1].block.group) rows = shared_rows<T>(p_, mine.block, tile, buffers);
        begin(mine, tile, 0, p_.state);
        Inputs<T> in{{}, buffers.s, buffers.su, nullptr, true};
        prepare<T>(p_, mine, tile, rows.low, buffers.u, &in);
        const bool last = i + 1 == count;
        const Prefetch prefetch = lines(channels[last ? 0 : i + 1].block, last ? next : tile, true);
        advance_both<T>(p_, mine, in, rows.B, rows.C, tile.count, buffers.y, &prefetch);
        finish(mine, tile, in.u, buffers.y[0], buffers);
      }
      from += tile.count;
    }
    if (a_.state)
      for (int64_t i = 0; i < count; ++i) store_state(channels[i], walk_.last_sequence(), 0, p_.state);
  }

  // Used if there are fewer blocks than threads: two threads share a block, and each has half of its states. They exchange their partial sums of y
  // every kRound steps. There are two buffers for the sums, used alternately, so that one barrier per round is enough.
  void halves(int64_t items) const {
    const Scratch<T> sums(2 * items * 2 * kRound * W), memory(2 * items * Channels<T>::size(p_));
    const Scratch<Channels<T>> channels(2 * items);
    const int64_t threads = least(p_.threads, 2 * items);
    const PerThread<Buffers> own(threads, [&] { return Buffers(p_, 0); });
    parallel_phases(threads, [&](PhasedTeam& team) {
      const Buffers& buffers = own[team.rank];
      const Range mine = share(2 * items, team);  // slot 2 i + k: half k of item i
      for (int64_t slot = mine.begin; slot < mine.end; ++slot) {
        Channels<T>& one = channels.data()[slot];
        one.load_parameters(p_, blocks_[slot / 2], memory.data() + slot * Channels<T>::size(p_));
        one.load_state(p_, p_.initial, walk_.first_sequence(), one.state);
      }
      for (int64_t round = 0; round * kRound < p_.length; ++round) {
        const int64_t begin_at = round * kRound, end = least(p_.length, begin_at + kRound);
        T* round_sums = sums.data() + round % 2 * items * 2 * kRound * W;
        for (int64_t slot = mine.begin; slot < mine.end; ++slot) {
          const int half = slot % 2;
          Channels<T>& one = channels.data()[slot];
          int64_t number = 0;
          for (int64_t from = begin_at; from < end; ++number) {
            const Tile tile = tile_at(from, end), next = ahead(tile);
            const Prefetch prefetch = lines(one.block, next, from + tile.count < end ? number % 2 != half : half == 0);
            const Shared<T> rows = shared_rows<T>(p_, one.block, tile, buffers);
            begin(one, tile, half ? first_half(p_.state) : 0, half ? p_.state : first_half(p_.state));
            Inputs<T> in{{}, buffers.s, buffers.su, nullptr, true};
            prepare<T>(p_, one, tile, rows.low, buffers.u, &in);
            advance_half<T>(p_, one, in, rows.B, rows.C, tile.count, half, round_sums + (slot * kRound + from - begin_at) * W, &prefetch);
            from += tile.count;
          }
        }
        team.barrier();
        for (int64_t slot = mine.begin; slot < mine.end; ++slot) {
          const Channels<T>& one = channels.data()[slot];
          int64_t number = 0;
          for (int64_t from = begin_at; from < end; ++number) {
            const Tile tile = tile_at(from, end);
            if (number % 2 == slot % 2) {
              const T *first = round_sums + (slot / 2 * 2 * kRound + from - begin_at) * W, *second = first + kRound * W;
              for (int64_t t = 0; t < tile.count; ++t) store(buffers.y[0] + t * W, load<T>(first + t * W) + load<T>(second + t * W));
              finish(one, tile, block_view<T>(p_.u, one.block, tile, buffers.u), buffers.y[0], buffers);
            }
            from += tile.count;
          }
        }
      }
      if (a_.state)
        for (int64_t slot = mine.begin; slot < mine.end; ++slot)
          store_state(channels.data()[slot], walk_.last_sequence(), slot % 2 ? first_half(p_.state) : 0, slot % 2 ? p_.state : first_half(p_.state));
    });
  }

  // The tile that begins at `from`. Checkpoints are stored between tiles.
  Tile tile_at(int64_t from, int64_t end) const { return walk_.tile(from, a_.checkpoints ? least(end, round_up(from + 1, chunk_)) : end); }
  // As many steps as the tile has, kTile steps later. If all tiles request these steps, a tile after a short one has been requested as a whole too.
  Tile ahead(const Tile& tile) const {
    const int64_t from = least(p_.length, tile.from + kTile);
    return walk_.steps(from, least(p_.length, from + tile.count));
  }

  // Prepares the state for a tile: if a segment begins here, sets it, and stores the final states [low, high) if a sequence has ended; stores a
  // checkpoint of states [low, high) if a chunk begins here.
  void begin(const Channels<T>& channels, const Tile& tile, int64_t low, int64_t high) const {
    if (a_.state && tile.begins_sequence()) store_state(channels, tile.previous, low, high);
    if (tile.begins_segment) channels.begin_segment(p_, tile);
    if (!a_.checkpoints || tile.from % chunk_) return;
    const Block& block = channels.block;
    T* to = static_cast<T*>(a_.checkpoints) + block.batch * a_.checkpoint_batch + tile.from / chunk_ * p_.state * p_.channels + block.channel;
    for (int64_t n = low; n < high; ++n) store_part(to + n * p_.channels, load<T>(channels.state + n * W), block.lanes);
  }

  // The cache lines of the next tile. finishes: whether this thread will write the tile's outputs.
  Prefetch lines(const Block& block, const Tile& next, bool finishes) const {
    Prefetch prefetch(next);
    prefetch.add(p_.u, block);
    if (!p_.rank) prefetch.add(p_.delta, block);
    if (finishes) prefetch.add(p_.z, block);
    if (finishes) prefetch.add(a_.out, block);
    return prefetch;
  }

  // out = scale (y + D u + earlier) silu(z)
  void finish(const Channels<T>& channels, const Tile& tile, const View<T>& u, const T* y, const Buffers& buffers) const {
    const Block& block = channels.block;
    const Vec<T> D = channels.D, scale = splat(static_cast<T>(p_.scale));
    const View<T> of_u = u;
    T* const gate = buffers.z;
    if (p_.z.data) {
      const View<T> z = block_view<T>(p_.z, block, tile, buffers.z);
      for (int64_t t = 0; t < tile.count; ++t) store(gate + t * W, silu<T>(load<T>(z[t])) * scale);
    }
    const auto before_gate = [=](int64_t t) { return fma(D, load<T>(of_u[t]), load<T>(y + t * W)); };
    if (a_.out.earlier)
      write<T>(a_.out, block, tile, [=, this, &block, &tile](int64_t t) {
        return (before_gate(t) + earlier<T>(a_.out, block, tile, t)) * (p_.z.data ? load<T>(gate + t * W) : scale);
      });
    else if (p_.z.data)
      write<T>(a_.out, block, tile, [=](int64_t t) { return before_gate(t) * load<T>(gate + t * W); });
    else
      write<T>(a_.out, block, tile, [=](int64_t t) { return before_gate(t) * scale; });
  }

  void store_state(const Channels<T>& channels, int64_t sequence, int64_t low, int64_t high) const {
    store_weights<T>(channels.state, a_.state, channels.state_row(p_, sequence), channels.block.lanes, p_.state, low, high);
  }

  const Arguments& a_;
  const Problem& p_;
  const Walk walk_;
  const Blocks<T> blocks_;
  const int64_t chunk_;
};

}  // namespace

MEDSSM_EXPORT(selective_scan_forward, Arguments) { a.problem.wide ? Forward<double>(a).run() : Forward<float>(a).run(); }
