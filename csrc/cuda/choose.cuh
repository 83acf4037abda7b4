// The choice of the best tokens by one block: radix select, compaction, and a sort where the order is the scores'.
#pragma once

#include "numbers.cuh"

namespace tokenops {

// (B, N)
struct Scores {
  const char* scores;
  Float score_type;
  int64_t stride_sb, stride_sn;  // in elements
  int N;
};

constexpr int BINS = 256;

// Scores as integers in their order: NaN the least of all, -0 and 0 alike.
__device__ inline uint64_t ordered(const Scores& p, int64_t b, int n) {
  const int64_t at = b * p.stride_sb + n * p.stride_sn;
  if (p.score_type == Float::F64) {
    const double s = reinterpret_cast<const double*>(p.scores)[at] + 0.0;
    const uint64_t bits = bits_of(s), sign = uint64_t{1} << 63;
    return s != s ? 0 : bits & sign ? ~bits : bits | sign;
  }
  float s;
  if (p.score_type == Float::F32) s = reinterpret_cast<const float*>(p.scores)[at];
  else if (p.score_type == Float::BF16) s = widen(reinterpret_cast<const BFloat16*>(p.scores)[at]);
  else s = widen(reinterpret_cast<const Half*>(p.scores)[at]);
  s += 0.0f;
  const uint32_t bits = bits_of(s), sign = uint32_t{1} << 31;
  return s != s ? 0 : bits & sign ? ~bits : bits | sign;
}

template <typename W>
__device__ W score(const Scores& p, int64_t b, int n) {
  const int64_t at = b * p.stride_sb + n * p.stride_sn;
  if (p.score_type == Float::F64) return static_cast<W>(reinterpret_cast<const double*>(p.scores)[at]);
  if (p.score_type == Float::F32) return reinterpret_cast<const float*>(p.scores)[at];
  if (p.score_type == Float::BF16) return widen(reinterpret_cast<const BFloat16*>(p.scores)[at]);
  return widen(reinterpret_cast<const Half*>(p.scores)[at]);
}

struct Choosing {
  int bins[BINS];
  int partial[2 * WARPS];
  uint64_t threshold;
  int wanted;
};

// The `count`-th best score: its bits in threshold, and in wanted how many of those that equal it are kept. A digit of
// eight bits at a time: the tokens that share the digits found so far are counted by their next one.
__device__ inline void find_threshold(const Scores& p, int64_t b, int count, Choosing& shared) {
  const int thread = threadIdx.x;
  if (thread == 0) shared.threshold = 0, shared.wanted = count;
  for (int shift = p.score_type == Float::F64 ? 56 : 24; shift >= 0; shift -= 8) {
    shared.bins[thread] = 0;
    __syncthreads();
    const uint64_t found = shared.threshold;
    for (int n = thread; n < p.N; n += THREADS) {
      const uint64_t key = ordered(p, b, n);
      // in two shifts: one of 64 bits is none
      if (key >> shift >> 8 == found >> shift >> 8) atomicAdd(&shared.bins[key >> shift & (BINS - 1)], 1);
    }
    __syncthreads();
    if (thread < 32) {  // every lane has eight digits, the last lane the largest
      int mine = 0;
      for (int i = 0; i < 8; ++i) mine += shared.bins[thread * 8 + i];
      int above = mine;  // of this lane and those behind it
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_down_sync(~0u, above, step);
        if (thread + step < 32) above += other;
      }
      above -= mine;
      const int wanted = shared.wanted;
      __syncwarp();
      if (above < wanted && wanted <= above + mine) {
        int digit = thread * 8 + 7;
        for (; above + shared.bins[digit] < wanted; --digit) above += shared.bins[digit];
        shared.threshold = found | static_cast<uint64_t>(digit) << shift;
        shared.wanted = wanted - above;
      }
    }
    __syncthreads();
  }
}

// list: the places of the kept tokens, then those of the others, both as they come.
__device__ inline void compact(const Scores& p, int64_t b, int count, Choosing& shared, uint16_t* list) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint64_t threshold = shared.threshold;
  const int wanted = shared.wanted;
  int greater = 0, equal = 0;  // tokens before this tile
  for (int start = 0; start < p.N; start += THREADS) {
    const int n = start + thread;
    const uint64_t key = n < p.N ? ordered(p, b, n) : 0;
    const bool above = n < p.N && count && key > threshold, level = n < p.N && count && key == threshold;
    const unsigned votes = __ballot_sync(~0u, above), ties = __ballot_sync(~0u, level);
    const unsigned before = (1u << lane) - 1;
    __syncthreads();  // the partial sums of the tile before have been read
    if (lane == 0) shared.partial[warp] = __popc(votes), shared.partial[WARPS + warp] = __popc(ties);
    __syncthreads();
    int greater_here = greater + __popc(votes & before), equal_here = equal + __popc(ties & before);
    for (int w = 0; w < WARPS; ++w) {
      const int g = shared.partial[w], e = shared.partial[WARPS + w];
      if (w < warp) greater_here += g, equal_here += e;
      greater += g, equal += e;
    }
    if (n < p.N) {
      const int kept_before = greater_here + (equal_here < wanted ? equal_here : wanted);
      const bool kept = above || (level && equal_here < wanted);
      list[kept ? kept_before : count + n - kept_before] = static_cast<uint16_t>(n);
    }
  }
  __syncthreads();
}

// The kept tokens best first: a bitonic network whose comparisons all look one way, so that no padding is needed.
__device__ inline void sort_kept(const Scores& p, int64_t b, int count, uint16_t* list) {
  for (int size = 2; size < 2 * count; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int t = threadIdx.x;; t += THREADS) {
        const int low = t / step * 2 * step + t % step;  // the t-th place with a partner behind it
        if (low >= count) break;
        const int high = step == size / 2 ? low ^ (size - 1) : low + step;
        if (high < count) {
          const uint16_t one = list[low], other = list[high];
          const uint64_t a = ordered(p, b, one), c = ordered(p, b, other);
          if (a < c || (a == c && one > other)) list[low] = other, list[high] = one;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace tokenops
