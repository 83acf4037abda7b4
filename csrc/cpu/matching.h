// Bipartite matching on a CPU, for the operators that use it.
#pragma once

#include "../merge_bipartite.h"

namespace tokenops {

// Which of the merged tokens each token of (B, rows, D) goes into: fills (B, sides.tokens).
struct Matching {
  const Tensor& metric;
  const Sides sides;
  const int64_t r;
  int64_t* const index;

  void operator()(int64_t b) const;  // an image; threads share it where no others are at work
  int64_t bytes() const { return sides.evens * (r > 0 ? sides.odds * metric.size(2) / 8 : 8); }  // as long as they take
};

}  // namespace tokenops
