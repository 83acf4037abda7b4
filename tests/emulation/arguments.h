// How Python calls an emulated operator: by numpy arrays with names, numbers among them as arrays of no dimension.
#pragma once

#include "emulation.h"

#include "../../csrc/cuda/rows.cuh"

#include <string>

struct Array {
  const char* name;
  char* data;
  int64_t itemsize, dimensions, shape[3], strides[3];
  char kind;  // as numpy's dtype.kind
};

class Arguments {
 public:
  Arguments(const Array* arrays, int count) : arrays_(arrays, arrays + count) {}

  const Array* find(const std::string& name) const {
    for (const Array& a : arrays_) {
      if (name == a.name) return &a;
    }
    return nullptr;
  }
  const Array& operator[](const std::string& name) const {
    const Array* const found = find(name);
    if (!found) throw std::invalid_argument("no " + name);
    return *found;
  }
  char* data(const std::string& name) const { return find(name) ? find(name)->data : nullptr; }
  int integer(const std::string& name) const { return number<int>(name); }
  template <typename T = double>
  T number(const std::string& name) const {
    const Array& a = (*this)[name];
    if (a.kind == 'f') return static_cast<T>(*reinterpret_cast<double*>(a.data));
    return static_cast<T>(*reinterpret_cast<int64_t*>(a.data));
  }
  uint64_t seed() const { return number<uint64_t>("seed"); }

 private:
  std::vector<Array> arrays_;
};

inline tokenops::Strided strided(const Array& a) { return {a.data, a.strides[0], a.strides[1], a.strides[2]}; }
inline tokenops::Strided strided(const Arguments& a, const char* name) {
  return a.find(name) ? strided(a[name]) : tokenops::Strided{};
}

inline tokenops::Norm norm_of(const Arguments& a, bool wanted) {
  return {wanted,           a.data("normed"), a.data("mean"),   a.data("deviation"),
          a.data("weight"), a.data("bias"),   a.number("eps")};
}

// bfloat16 comes as its bits
inline tokenops::Float float_of(const Array& a) {
  using tokenops::Float;
  if (a.itemsize != 2) return a.itemsize == 8 ? Float::F64 : Float::F32;
  return a.kind == 'f' ? Float::F16 : Float::BF16;
}

template <typename F>
void with_type(const Array& a, const F& f) {
  switch (float_of(a)) {
    case tokenops::Float::F32: return f(float{});
    case tokenops::Float::BF16: return f(tokenops::BFloat16{});
    case tokenops::Float::F16: return f(tokenops::Half{});
    default: return f(double{});
  }
}

inline void check_alignment(int width) {
  if (!width) throw std::invalid_argument("not aligned to its elements");
}

// What a module defines: it writes the arrays in place, and into `results` what the plan chose.
void run(const Arguments& a, int64_t* results);

extern "C" __attribute__((visibility("default"))) int call(const Array* arrays, int count, int64_t* results,
                                                           char* error, int room) {
  try {
    run({arrays, count}, results);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), room - 1);
    return 1;
  }
}
