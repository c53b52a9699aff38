// Memory for the duration of a call: aligned to a cache line, not initialised. Throws a Failure with the number of bytes if
// it cannot be allocated.
#pragma once
#include <cstdint>
#include <new>

#include "medssm/failure.h"

namespace medssm {
namespace {

template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    data_ = static_cast<T*>(::operator new(bytes, kAlignment, std::nothrow));
    if (!data_) throw Failure::no_memory(static_cast<int64_t>(bytes));
  }
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// One object per thread of a parallel region. They are made by make() before the region begins, so if an allocation fails, no other thread is waiting
// at a barrier.
template <class T> class PerThread {
 public:
  template <class Make> PerThread(int64_t threads, const Make& make) : PerThread(threads < 1 ? 1 : threads) {
    do { new (places_.data() + made_) Place{make()}; } while (++made_ < threads);
  }
  ~PerThread() {
    while (made_ > 0) places_.data()[--made_].~Place();
  }
  T& operator[](int64_t rank) const { return places_.data()[rank].value; }

 private:
  struct alignas(64) Place {  // so that threads do not share a cache line
    T value;
  };
  explicit PerThread(int64_t threads) : places_(threads) {}

  const Scratch<Place> places_;
  int64_t made_ = 0;
};

}  // namespace
}  // namespace medssm
