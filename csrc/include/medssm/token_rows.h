// Reads the rows of a tile from tensors (b, l, h, d) of any type, with adjacent elements, in the form that kernels need; and writes rows back.
#pragma once
#include "medssm/parallel.h"
#include "medssm/simd.h"
#include "medssm/walk.h"

namespace medssm {
namespace {

// A tensor (b, l, h, d). Strides are in elements. All fields are 8 bytes. data may be null.
struct HeadTokens {
  const void* data;
  int64_t type, batch, token, head;
};
struct HeadOutput {
  void* data;
  int64_t type, batch, token, head;
};

// For a new contiguous output.
MEDSSM_INLINE void prefer_huge_pages(const HeadOutput& x, int64_t batch) {
  prefer_huge_pages(x.data, batch * x.batch * (x.type == kFloat64 ? 8 : x.type == kFloat32 ? 4 : 2));
}

// Row t of a tile is at rows + t * step.
template <class T> struct View {
  const T* rows;
  int64_t step;
  MEDSSM_INLINE const T* operator[](int64_t t) const { return rows + t * step; }
};

template <class T> constexpr int64_t kStorage = sizeof(T) == 8 ? kFloat64 : kFloat32;

// Copies elements [from, from + count) of one head, for each step of a tile, to `to` [kTileSteps][padded]. Elements from count to padded become zero.
template <class T>
void stage_rows(const HeadTokens& x, int64_t batch, int64_t head, int64_t from, int64_t count, int64_t padded, const Tile& tile, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t whole = count / W * W;
  const int rest = static_cast<int>(count - whole);
  with_storage(x.type, x.data, [&](const auto* data) {
    data += batch * x.batch + head * x.head + from;
    for (int64_t t = 0; t < tile.count; ++t, to += padded) {
      const auto* row = data + tile.token(t) * x.token;
      for (int64_t e = 0; e < whole; e += W) store(to + e, load<T>(row + e));
      for (int64_t e = whole; e < padded; e += W) {
        const Vec<T> v = e == whole && rest ? load_part<T>(row + e, rest) : Vec<T>{};
        // A masked store is much slower than a full one. A full store may write into the next row, which is written later anyway.
        if (e + W <= padded || t + 1 < tile.count)
          store(to + e, v);
        else
          store_part(to + e, v, static_cast<int>(padded - e));
      }
    }
  });
}

// The same rows as stage_rows. If the tensor already has such rows, they are used without a copy.
template <class T>
View<T> rows_of(const HeadTokens& x, int64_t batch, int64_t head, int64_t from, int64_t count, int64_t padded, const Tile& tile, T* buffer) {
  if (x.type == kStorage<T> && count == padded && !tile.index)
    return {static_cast<const T*>(x.data) + batch * x.batch + head * x.head + from + tile.first * x.token, tile.direction * x.token};
  stage_rows<T>(x, batch, head, from, count, padded, tile, buffer);
  return {buffer, padded};
}

// Copies one number per step: element 0 of each row.
template <class T> void stage_numbers(const HeadTokens& x, int64_t batch, int64_t head, const Tile& tile, T* to) {
  with_storage(x.type, x.data, [&](const auto* data) {
    data += batch * x.batch + head * x.head;
    for (int64_t t = 0; t < tile.count; ++t) to[t] = to_compute<T>(data[tile.token(t) * x.token]);
  });
}

// Writes the first `lanes` lanes of the vector value(t) to elements from, from + 1, … of one head, for each step t of a tile.
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
