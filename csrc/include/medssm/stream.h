// Stores that bypass the caches, for large results. A cache line need not be read from memory before it is written, and other data stays in the
// caches.
#pragma once
#include "medssm/simd.h"

namespace medssm {
namespace {

// Whether stores of `elements` numbers of type S, computed in T in rows of `channels`, should bypass the caches. They should if the result is too
// large to stay in the caches, and if every vector is a whole cache line (AVX-512, no type conversion).
template <class T, class S> MEDSSM_INLINE bool streams(const S* data, int64_t elements, int64_t channels) {
  constexpr int64_t kLarge = 4 << 20;
  return kVectorBytes == 64 && sizeof(S) == sizeof(T) && elements * static_cast<int64_t>(sizeof(S)) > kLarge && channels % kLanes<T> == 0 &&
         reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

// Call this before other threads read data that this thread wrote with such stores.
MEDSSM_INLINE void finish_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <class S, class V> MEDSSM_INLINE void write(S* p, V v, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == sizeof(v[0]))
    if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
  store(p, v);
}

}  // namespace
}  // namespace medssm
