// What ops over heads do before they begin: how many threads they use, and large pages for their outputs.
#pragma once
#include "medssm/token_rows.h"

namespace medssm {
namespace {

// How many of `threads` to use for so many independent items, each on so many numbers.
MEDSSM_INLINE int64_t useful_threads(int64_t threads, int64_t items, int64_t numbers) {
  return least(least(threads, items), ceil_div(items * numbers, int64_t{1} << 15));
}

// Asks for large pages for contiguous outputs (b, l, ...), before the first write. Null outputs are skipped.
template <class... Outputs> void prefer_huge_pages_for(int64_t batch, const Outputs&... outputs) {
  const auto bytes = [&](const HeadOutput& to) { return batch * to.batch * (to.type == kFloat64 ? 8 : to.type == kFloat32 ? 4 : 2); };
  ((outputs.data ? prefer_huge_pages(outputs.data, bytes(outputs)) : void()), ...);
}

}  // namespace
}  // namespace medssm
