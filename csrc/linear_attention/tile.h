// Operations on a tile: kTokens rows of one head's channels, dense, in the compute type, padded with zeros to whole vectors.
#pragma once
#include "medssm/lanes.h"
#include "medssm/shuffle.h"
#include "medssm/stream.h"
#include "problem.h"

namespace medssm {
namespace {

// The feature map f(x), and its derivative as a function of f(x).
template <int64_t kMap, class T> MEDSSM_INLINE Vec<T> feature(Vec<T> x) {
  if constexpr (kMap == kRelu) return max(Vec<T>{}, x);
  // elu(x) + 1 without a branch: the sum is x + 1 for x > 0, because e^0 is exactly 1, and e^x for x <= 0.
  if constexpr (kMap == kElu) return max(Vec<T>{}, x) + exp_bounded<T>(max(splat(-kExpBound<T>), min(Vec<T>{}, x)));
  return x;
}
template <int64_t kMap, class T> MEDSSM_INLINE Vec<T> slope(Vec<T> f) {
  const Vec<T> one = splat(static_cast<T>(1));
  if constexpr (kMap == kRelu) return select(f > 0, one, Vec<T>{});
  if constexpr (kMap == kElu) return min(one, f);
  return one;
}
// Calls body with the feature map as a compile-time constant.
template <class Body> MEDSSM_INLINE void with_feature(int64_t map, const Body& body) {
  switch (map) {
    case kRelu:
      return body(std::integral_constant<int64_t, kRelu>{});
    case kElu:
      return body(std::integral_constant<int64_t, kElu>{});
    default:
      return body(std::integral_constant<int64_t, kIdentity>{});
  }
}

// The first n lanes of x, then zeros.
template <class T> MEDSSM_INLINE Vec<T> first_lanes(Vec<T> x, int64_t n) {
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store(lanes, x);
  return load_part<T>(lanes, static_cast<int>(n));
}

// Applies the feature map to the heads [first, first + heads) of a tile's tokens and stores one tile per head, its tokens in the order of the walk.
// Prefetches the rows of the next tile into the second-level cache: the first-level cache has no room for two tiles.
template <class T> void load_tiles(const Tokens& x, int64_t map, int64_t n, const Tile& tile, int64_t first, int64_t heads, int64_t width, T* tiles) {
  constexpr int W = kLanes<T>;
  const int64_t padded = padded_width<T>(width), whole = width / W * W, ahead = tile.index ? 0 : kTokens * tile.direction * x.stride[1];
  with_storage(x.type, static_cast<const void*>(x.data), [&](const auto* data) {
    with_feature(map, [&](auto chosen) {
      constexpr int64_t kMap = decltype(chosen)::value;
      data += n * x.stride[0] + first * x.stride[2];
      for (int64_t t = 0; t < tile.count; ++t) {
        const auto* row = data + tile.token(t) * x.stride[1];
        T* target = tiles + t * padded;
        for (int64_t h = 0; h < heads; ++h, row += x.stride[2], target += kTokens * padded) {
          for (int64_t c = 0; c < whole; c += W) {
            __builtin_prefetch(row + c + ahead, 0, 2);
            store(target + c, feature<kMap, T>(load<T>(row + c)));
          }
          for (int64_t c = whole; c < padded; c += W) {
            const int64_t rest = most<int64_t>(0, width - c);
            store(target + c, first_lanes<T>(feature<kMap, T>(load_part<T>(row + c, static_cast<int>(rest))), rest));
          }
        }
      }
    });
  });
}

template <class T> struct Neighbour {
  static constexpr int at(int i) { return i ^ 1; }
};
// For each channel of a rotated pair (a, b) -> (a cos - b sin, b cos + a sin): the sign of the other channel's part.
template <class T> MEDSSM_INLINE Vec<T> signs() {
  Vec<T> s;
  for (int i = 0; i < kLanes<T>; ++i) s[i] = i % 2 ? T(1) : T(-1);
  return s;
}

// Rotates the pairs of channels of a head by the angles of their tokens. back: by the negative angles, which is the transposed map.
template <class T> void rotate(const Problem& p, bool back, const Tile& tile, int64_t group, const T* rows, T* rotated) {
  constexpr int W = kLanes<T>;
  const Vec<T> sign = back ? -signs<T>() : signs<T>();
  const int64_t padded = padded_width<T>(p.dk);
  for (int64_t t = 0; t < tile.count; ++t) {
    const T* cos = static_cast<const T*>(p.cos.data) + tile.token(t) * p.cos.stride[0] + group * p.cos.stride[1];
    const T* sin = static_cast<const T*>(p.sin.data) + tile.token(t) * p.sin.stride[0] + group * p.sin.stride[1];
    for (int64_t c = 0; c < p.dk; c += W) {
      const int n = static_cast<int>(least<int64_t>(W, p.dk - c));
      const Vec<T> x = load<T>(rows + t * padded + c), s = load_part<T>(sin + c, n);
      const Vec<T> across = back ? shuffle<T, Neighbour<T>>(x * s, x) : shuffle<T, Neighbour<T>>(x, x) * s;
      store(rotated + t * padded + c, fma(x, load_part<T>(cos + c, n), sign * across));
    }
  }
}

// sums[r] += sum_t a_t[r] b_t, where b_t has `width` numbers and begins at b + t b_step. A tile is summed in registers from zero and then added, so
// that `sums` is rounded once per tile.
template <class T> void add_products(const T* a, int64_t a_row, const T* b, int64_t b_step, int64_t width, int64_t count, T* sums) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < a_row; r += W)
    for (int64_t c = 0; c < width; c += W) {
      Vec<T> total[W] = {};
      for (int64_t t = 0; t < count; ++t) {
        const Vec<T> own = load<T>(b + t * b_step + c);
        const T* scalars = a + t * a_row + r;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) total[i] = fma(splat(scalars[i]), own, total[i]);
      }
      T* target = sums + r * width + c;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(target + i * width, load<T>(target + i * width) + total[i]);
    }
}

// Calls f(t, c, o) for each token t < count and each vector of channels, the first of which is c: o = sum_{r < width} a_t[r] rows[r][c ...]. A row
// has `row` numbers.
template <class T, class F>
MEDSSM_INLINE void apply(const T* a, int64_t a_row, const T* rows, int64_t width, int64_t row, int64_t count, const F& f) {
  constexpr int W = kLanes<T>, kBlock = 8;
  for (int64_t from = 0; from < count; from += kBlock)
    for (int64_t c = 0; c < row; c += W) {
      Vec<T> total[kBlock] = {};
      const T* scalars = a + from * a_row;
      for (int64_t r = 0; r < width; ++r) {
        const Vec<T> own = load<T>(rows + r * row + c);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) total[i] = fma(splat(scalars[i * a_row + r]), own, total[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i)
        if (from + i < count) f(from + i, c, total[i]);
    }
}

// dots[t] = a_t . b_t for a tile's tokens. With b_step 0 all have the same b.
template <class T> void dot_rows(const T* a, const T* b, int64_t b_step, int64_t row, int64_t count, T* dots) {
  constexpr int W = kLanes<T>;
  for (int64_t from = 0; from < count; from += W) {
    Vec<T> products[W] = {};
    for (int64_t c = 0; c < row; c += W)
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) products[i] = fma(load<T>(a + (from + i) * row + c), load<T>(b + (from + i) * b_step + c), products[i]);
    store(dots + from, sum_each<T, W>(products));
  }
}

// sum += sum_t by[t] a_t. If `by` is null it is 1.
template <class T> void add_rows(const T* a, const T* by, int64_t row, int64_t count, T* sum) {
  for (int64_t c = 0; c < row; c += kLanes<T>) {
    Vec<T> total = {};
    for (int64_t t = 0; t < count; ++t) total += by ? by[t] * load<T>(a + t * row + c) : load<T>(a + t * row + c);
    store(sum + c, load<T>(sum + c) + total);
  }
}

// a_t += by[t] shared. If `by` is null it is 1.
template <class T> void add_row(T* a, const T* by, int64_t row, int64_t count, const T* shared) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < row; c += kLanes<T>) {
      const Vec<T> own = load<T>(shared + c);
      store(a + t * row + c, load<T>(a + t * row + c) + (by ? by[t] * own : own));
    }
}

// dots[t] = q_t . z_t with z_t = z + sum_{s <= t} k_s. Then z becomes z_t of the tile's last token.
template <class T> void running_dots(const T* q, const T* k, int64_t row, int64_t count, T* z, T* dots) {
  constexpr int W = kLanes<T>;
  alignas(64) T products[kTokens * W] = {};
  for (int64_t c = 0; c < row; c += W) {
    Vec<T> own = load<T>(z + c);
    for (int64_t t = 0; t < count; ++t) {
      own += load<T>(k + t * row + c);
      store(products + t * W, fma(load<T>(q + t * row + c), own, load<T>(products + t * W)));
    }
    store(z + c, own);
  }
  for (int64_t from = 0; from < count; from += W) {
    Vec<T> sums[W];
    for (int i = 0; i < W; ++i) sums[i] = load<T>(products + (from + i) * W);
    store(dots + from, sum_each<T, W>(sums));
  }
}
// out_t += by[t] z_t with the same z_t. z does not change.
template <class T> void add_running(const T* k, const T* by, int64_t row, int64_t count, const T* z, T* out) {
  for (int64_t c = 0; c < row; c += kLanes<T>) {
    Vec<T> own = load<T>(z + c);
    for (int64_t t = 0; t < count; ++t) {
      own += load<T>(k + t * row + c);
      store(out + t * row + c, load<T>(out + t * row + c) + by[t] * own);
    }
  }
}
// out_t += z_t with z_t = z + sum_{s <= t} by[s] a_s. Then z becomes z_t of the tile's last token.
template <class T> void add_running_sums(const T* a, const T* by, int64_t row, int64_t count, T* z, T* out) {
  for (int64_t c = 0; c < row; c += kLanes<T>) {
    Vec<T> own = load<T>(z + c);
    for (int64_t t = 0; t < count; ++t) {
      own += by[t] * load<T>(a + t * row + c);
      store(out + t * row + c, load<T>(out + t * row + c) + own);
    }
    store(z + c, own);
  }
}

// a_t *= by[t].
template <class T> void multiply_rows(T* a, const T* by, int64_t row, int64_t count) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < row; c += kLanes<T>) store(a + t * row + c, load<T>(a + t * row + c) * by[t]);
}

// Writes the vector of channels that begins at channel c; only those below `width`.
template <class T, class S> MEDSSM_INLINE void write_part(S* row, int64_t c, int64_t width, Vec<T> value, bool stream) {
  if (c + kLanes<T> <= width)
    write(row + c, value, stream);
  else
    store_part(row + c, value, static_cast<int>(width - c));
}

}  // namespace
}  // namespace medssm
