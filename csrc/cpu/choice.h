// Which of many scores are the best, on a CPU: counting those that reach a bound is faster than sorting.
#pragma once

#include "isa.h"
#include "rows.h"

#include <type_traits>
#include <utility>

namespace tokenops {
namespace {

template <typename Wide>
using KeyOf = std::conditional_t<std::is_same_v<Wide, double>, uint64_t, uint32_t>;

// Integers in the order of the scores: NaN the least of all, -0 and 0 alike.
template <typename Score, typename Bits>
INLINE void order(const Score* scores, Bits* keys, int64_t n) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  for (int64_t i = 0; i < n; ++i) {
    const Score score = scores[i] + Score{0};
    Bits bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits & sign ? ~bits : bits | sign;
    keys[i] = score != score ? 0 : bits;
  }
}
CLONES void keys_of(const float* scores, uint32_t* keys, int64_t n) { order(scores, keys, n); }
CLONES void keys_of(const double* scores, uint64_t* keys, int64_t n) { order(scores, keys, n); }

// The best `count` of n keys are those above `last`, and of those equal to it the first `ties`.
template <typename Bits>
struct Bound {
  Bits last;
  int64_t ties;
};

template <typename Bits>
INLINE int64_t count_reaching(const Bits* keys, int64_t n, Bits bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n;) {  // in parts whose counts fit in a key's bits
    Bits part = 0;
    const int64_t end = std::min<int64_t>(n, i + (int64_t{1} << 30));
    for (; i < end; ++i) part += keys[i] >= bound;
    count += static_cast<int64_t>(part);
  }
  return count;
}

// The least of the best is found bit by bit, from the first in which keys differ.
template <typename Bits>
INLINE Bound<Bits> bound(const Bits* keys, int64_t n, int64_t count) {
  Bits all = ~Bits{0}, any = 0;
  for (int64_t i = 0; i < n; ++i) all &= keys[i], any |= keys[i];
  Bits last = all;
  if (all != any) {
    int bit = 8 * sizeof(Bits) - 1 - (sizeof(Bits) == 8 ? __builtin_clzll(all ^ any) : __builtin_clz(all ^ any));
    last = all >> bit >> 1 << bit << 1;
    for (; bit >= 0; --bit) {
      const Bits candidate = last | Bits{1} << bit;
      const int64_t reaching = count_reaching(keys, n, candidate);
      if (reaching == count) return {candidate - 1, 0};
      if (reaching > count) last = candidate;
    }
  }
  return {last, last == ~Bits{0} ? count : count - count_reaching(keys, n, last + 1)};
}
CLONES Bound<uint32_t> bound_of(const uint32_t* keys, int64_t n, int64_t count) { return bound(keys, n, count); }
CLONES Bound<uint64_t> bound_of(const uint64_t* keys, int64_t n, int64_t count) { return bound(keys, n, count); }

// The places of the best `count` of n keys, in their order; there is room for one more.
template <typename Bits>
void best_places(const Bits* keys, int64_t n, int64_t count, int64_t* places) {
  if (count == 0) return;
  auto [last, ties] = bound_of(keys, n, count);
  int64_t i = 0, found = 0;
  for (; i < n && ties > 0; ++i) {  // without a branch, which would be a coin's toss
    places[found] = i;
    found += keys[i] >= last;
    ties -= keys[i] == last;
  }
  for (; i < n; ++i) {
    places[found] = i;
    found += keys[i] > last;
  }
}

}  // namespace
}  // namespace tokenops
