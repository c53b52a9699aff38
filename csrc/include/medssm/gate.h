// The gradients of a gated output, out = y silu(z).
#pragma once
#include "medssm/activation.h"
#include "medssm/heads.h"
#include "medssm/matrix_scan.h"

namespace medssm {
namespace {

// dy = dout silu(z) and dz = dout y silu'(z), all of them (batch, length, heads, rows).
template <class T> void gate_gradient(const MatrixShape& shape, int64_t length, int64_t threads, const HeadTokens& dout, const HeadTokens& y,
                                      const HeadTokens& z, const HeadOutput& dy, const HeadOutput& dz) {
  constexpr int W = kLanes<T>;
  const Walk raster(length);
  const int64_t tiles = ceil_div(length, kTileSteps), items = shape.batch * tiles;
  threads = useful_threads(threads, items, kTileSteps * shape.heads * shape.rows);
  const PerThread<Scratch<T>> memory(threads, [] { return Scratch<T>(5 * kTileSteps * W); });
  parallel(threads, [&](const Team& team) {
    T *const out_buffer = memory[team.rank].data(), *const y_buffer = out_buffer + kTileSteps * W, *const z_buffer = y_buffer + kTileSteps * W;
    T *const gated = z_buffer + kTileSteps * W, *const slopes = gated + kTileSteps * W;
    const Range mine = share(items, team);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t batch = item / tiles;
      const Tile tile = raster.tile(item % tiles * kTileSteps, length);
      for (int64_t head = 0; head < shape.heads; ++head)
        for (int64_t from = 0; from < shape.rows; from += W) {
          const int width = static_cast<int>(least<int64_t>(W, shape.rows - from));
          const View<T> dout_rows = rows_of<T>(dout, batch, head, from, width, W, tile, out_buffer);
          const View<T> y_rows = rows_of<T>(y, batch, head, from, width, W, tile, y_buffer);
          const View<T> z_rows = rows_of<T>(z, batch, head, from, width, W, tile, z_buffer);
          for (int64_t t = 0; t < tile.count; ++t) {
            const Silu<T> silu = silu_and_slope<T>(load<T>(z_rows[t]));
            store(gated + t * W, load<T>(dout_rows[t]) * silu.value);
            store(slopes + t * W, load<T>(dout_rows[t]) * load<T>(y_rows[t]) * silu.slope);
          }
          write_rows<T>(dy, batch, head, from, width, tile, [&](int64_t t) { return load<T>(gated + t * W); });
          write_rows<T>(dz, batch, head, from, width, tile, [&](int64_t t) { return load<T>(slopes + t * W); });
        }
    }
  });
}

}  // namespace
}  // namespace medssm
