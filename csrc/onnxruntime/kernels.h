// Calls the kernels of libmedssm_cpu, which lies beside this library: the C counterpart of kernels/native.py.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "orders.h"

namespace medssm::ort {

#if defined(__APPLE__)
constexpr const char* kLibrary = "libmedssm_cpu.dylib";
#else
constexpr const char* kLibrary = "libmedssm_cpu.so";
#endif

class Library {
 public:
  static const Library& get() {
    static const Library library;
    return library;
  }

  template <class F> F* function(const std::string& name) const {
    void* found = dlsym(handle_, name.c_str());
    if (!found) throw std::runtime_error(file_ + " has no " + name);
    return reinterpret_cast<F*>(found);
  }
  const std::string& isa() const { return isa_; }

 private:
  Library() {
    Dl_info own;
    if (!dladdr(reinterpret_cast<void*>(&Library::get), &own)) throw std::runtime_error("the folder of this library is not known");
    const std::string path = own.dli_fname;
    const size_t slash = path.rfind('/');
    file_ = (slash == std::string::npos ? "./" : path.substr(0, slash + 1)) + kLibrary;
    handle_ = dlopen(file_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) throw std::runtime_error(std::string("the library of kernels does not load: ") + dlerror());
    const std::string version = function<const char*()>("medssm_cpu_version")();
    if (version != MEDSSM_VERSION)
      throw std::runtime_error(file_ + " was built for medssm " + version +
                               ", the library of custom operators for " MEDSSM_VERSION ": install again");
    const char* wanted = std::getenv("MEDSSM_CPU_ISA");
    isa_ = wanted && *wanted ? wanted : function<const char*()>("medssm_cpu_isa")();
  }

  std::string file_, isa_;
  void* handle_;
};

// The fields of a kernel's argument struct, each of 8 bytes.
class Arguments {
 public:
  template <class... Values> Arguments& add(Values... values) {
    (add_one(values), ...);
    return *this;
  }

  // The five fields of a walk (csrc/include/medssm/walk.h), without packed sequences; `reverse` turns it round.
  Arguments& add_walk(const Walk& walk, bool reverse) {
    return add(walk.index.empty() ? nullptr : walk.index.data(), walk.starts.empty() ? nullptr : walk.starts.data(), nullptr, walk.starts.size(),
               walk.reverse != reverse);
  }

  const int64_t* data() const { return values_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(values_.size() * sizeof(int64_t)); }

 private:
  template <class T> void add_one(T value) {
    if constexpr (std::is_floating_point_v<T>) {
      const double wide = value;
      int64_t bits;
      std::memcpy(&bits, &wide, sizeof(bits));
      values_.push_back(bits);
    } else if constexpr (std::is_pointer_v<T> || std::is_null_pointer_v<T>) {
      values_.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(static_cast<const void*>(value))));
    } else {
      values_.push_back(static_cast<int64_t>(value));
    }
  }

  std::vector<int64_t> values_;
};

// A kernel of the library, "selective_scan_forward". Made once: it looks the function up.
class Kernel {
 public:
  explicit Kernel(const std::string& name) :
      name_(name), run_(Library::get().function<int64_t(const int64_t*)>("medssm_" + name + "_" + Library::get().isa())) {
    bytes_ = Library::get().function<int64_t()>("medssm_" + name + "_bytes_" + Library::get().isa())();
  }

  void operator()(const Arguments& arguments) const {
    if (arguments.bytes() != bytes_)
      throw std::runtime_error(name_ + ": the library of kernels is of another build than the library of custom operators: install again");
    const int64_t status = run_(arguments.data());
    if (status > 0) throw std::runtime_error(name_ + ": could not allocate " + std::to_string(status) + " bytes of scratch memory");
    if (status < 0) throw std::runtime_error(name_ + ": " + Library::get().function<const char*()>("medssm_cpu_error")());
  }

 private:
  std::string name_;
  int64_t (*run_)(const int64_t*);
  int64_t bytes_;
};

}  // namespace medssm::ort
