// Rows of a tile from tensors (b, l, h, d) of any type with adjacent elements, as a kernel reads them; and back.
#pragma once
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

// (b, l, h, d), strides in elements; all fields are 8 bytes. data may be null.
struct HeadTokens {
  const void* data;
  int64_t type, batch, token, head;
};
struct HeadOutput {
  void* data;
  int64_t type, batch, token, head;
};

// Row t of a tile is at rows + t * step.
template <class T> struct View {
  const T* rows;
  int64_t step;
  MEDSSM_INLINE const T* operator[](int64_t t) const { return rows + t * step; }
};

template <class T> constexpr int64_t kStorage = sizeof(T) == 8 ? kFloat64 : kFloat32;

// Elements [from, from + count) of one head, for each step of a tile: [kTileSteps][padded] in `to`, zeros behind them. padded: at least count.
template <class T>
void stage_rows(const HeadTokens& x, int64_t batch, int64_t head, int64_t from, int64_t count, int64_t padded, const Tile& tile, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t whole = count / W * W;
  with_storage(x.type, x.data, [&](const auto* data) {
    data += batch * x.batch + head * x.head + from;
    for (int64_t t = 0; t < tile.count; ++t, to += padded) {
      const auto* row = data + tile.token(t) * x.token;
      for (int64_t e = 0; e < whole; e += W) store(to + e, load<T>(row + e));
      for (int64_t e = whole; e < padded; e += W)
        store_part(to + e, load_part<T>(row + e, static_cast<int>(most<int64_t>(0, count - e))), static_cast<int>(least<int64_t>(W, padded - e)));
    }
  });
}

// The same, in place where the tensor already has such rows.
template <class T>
View<T> rows_of(const HeadTokens& x, int64_t batch, int64_t head, int64_t from, int64_t count, int64_t padded, const Tile& tile, T* buffer) {
  if (x.type == kStorage<T> && count == padded && !tile.index)
    return {static_cast<const T*>(x.data) + batch * x.batch + head * x.head + from + tile.first * x.token, tile.direction * x.token};
  stage_rows<T>(x, batch, head, from, count, padded, tile, buffer);
  return {buffer, padded};
}

// One number a step: element 0 of each row.
template <class T> void stage_numbers(const HeadTokens& x, int64_t batch, int64_t head, const Tile& tile, T* to) {
  with_storage(x.type, x.data, [&](const auto* data) {
    data += batch * x.batch + head * x.head;
    for (int64_t t = 0; t < tile.count; ++t) to[t] = to_compute<T>(data[tile.token(t) * x.token]);
  });
}

// Writes value(t), a vector of which `lanes` count, to elements from, from + 1, … of one head at each step of a tile.
template <class T, class F>
MEDSSM_INLINE void write_rows(const HeadOutput& x, int64_t batch, int64_t head, int64_t from, int lanes, const Tile& tile, F value) {
  with_storage(x.type, x.data, [&](auto* data) {
    data += batch * x.batch + head * x.head + from;
    if (lanes == kLanes<T>)
      for (int64_t t = 0; t < tile.count; ++t) store(data + tile.token(t) * x.token, value(t));
    else
      for (int64_t t = 0; t < tile.count; ++t) store_part(data + tile.token(t) * x.token, value(t), lanes);
  });
}

}  // namespace
}  // namespace medssm
