// How wide the accesses to tensors may be.
#pragma once

#include "numbers.cuh"

#include <initializer_list>
#include <utility>

namespace tokenops {

// The bytes of an access to (B, rows, C) tensors, given with their rows, and to channels side by side at `addresses`
inline int access_width(int64_t element, int64_t B, int64_t C, uint64_t addresses,
                        std::initializer_list<std::pair<const Strided*, int64_t>> tensors) {
  bool dense = true;
  addresses |= C * element;
  for (const auto& [t, rows] : tensors) {
    dense = dense && (C == 1 || t->stride_c == element);
    addresses |= reinterpret_cast<uintptr_t>(t->data);
    if (B > 1) addresses |= t->stride_b;
    if (rows > 1) addresses |= t->stride_n;
    if (!dense && C > 1) addresses |= t->stride_c;
  }
  if (addresses % element) return 0;
  return dense && addresses % 16 == 0 ? 16 : static_cast<int>(element);
}

}  // namespace tokenops
