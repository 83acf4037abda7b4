#include "arguments.h"

#include "../../csrc/cuda/mma.cuh"

using namespace tokenops;

namespace {

using Rows = uint16_t[32][8];

// A warp: `places` tells where each lane's row lies, `words` becomes what the lanes get of the matrices.
void load_kernel(const uint16_t* rows, const int64_t* places, uint32_t* words) {
  SHARED(Rows, held);
  const int lane = threadIdx.x;
  uint32_t mine[4];
  std::memcpy(held[lane], rows + lane * 8, 16);
  __syncwarp();
  load_matrices(mine, held[places[lane]]);
  std::memcpy(words + lane * 4, mine, sizeof(mine));
}

template <typename T>
void multiply_kernel(const uint32_t* a, const uint32_t* b, float* sums) {
  const int lane = threadIdx.x;
  uint32_t left[4];
  float mine[4];
  std::memcpy(left, a + lane * 4, sizeof(left)), std::memcpy(mine, sums + lane * 4, sizeof(mine));
  multiply<T>(mine, left, b[lane * 2], b[lane * 2 + 1]);
  std::memcpy(sums + lane * 4, mine, sizeof(mine));
}

template <typename T>
T* words(const Arguments& a, const char* name) {
  return reinterpret_cast<T*>(a[name].data);
}

}  // namespace

// Fragments of a warp's lanes, (32, words): sums += a b^T
void run(const Arguments& a, int64_t*) {
  const auto kernel = a.integer("half") ? multiply_kernel<Half> : multiply_kernel<BFloat16>;
  emulation::launch({1}, {32}, a.seed(), load_kernel, words<uint16_t>(a, "rows"), words<int64_t>(a, "places"),
                    words<uint32_t>(a, "words"));
  emulation::launch({1}, {32}, a.seed(), kernel, words<uint32_t>(a, "a"), words<uint32_t>(a, "b"),
                    words<float>(a, "sums"));
}
