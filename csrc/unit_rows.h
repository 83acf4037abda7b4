// Rows of any length have a norm: those whose squares may overflow or vanish are first multiplied by a power of two,
// which rounds nothing.
#pragma once

#include <type_traits>

namespace tokenops {

// Of the squares' sum: from LOW to HIGH a row is taken as it is, else it is multiplied by UP or DOWN.
template <typename Wide>
struct Powers {
  static constexpr bool DOUBLE = std::is_same_v<Wide, double>;
  static constexpr Wide LOW = DOUBLE ? Wide(0x1p-800) : Wide(0x1p-80f), HIGH = DOUBLE ? Wide(0x1p900) : Wide(0x1p100f);
  static constexpr Wide UP = DOUBLE ? Wide(0x1p700) : Wide(0x1p90f), DOWN = DOUBLE ? Wide(0x1p-600) : Wide(0x1p-76f);
  static constexpr Wide SMALLEST = DOUBLE ? Wide(0x1p-1022) : Wide(0x1p-126f);  // norm that counts

#ifdef __CUDACC__
  __device__
#endif
  static constexpr Wide of(Wide squares) { return squares > HIGH ? DOWN : squares < LOW ? UP : Wide(1); }
};

}  // namespace tokenops
