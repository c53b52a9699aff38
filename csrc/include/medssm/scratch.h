// Memory for the duration of a call: aligned to a cache line, not initialised.
#pragma once
#include <cstdint>
#include <new>

namespace medssm {
namespace {

template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace
}  // namespace medssm
