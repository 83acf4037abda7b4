// What the sanitizers and the scheduler must catch.
#include "arguments.h"

namespace {

enum Bug { NONE, GLOBAL_WRITE, SHARED_WRITE, MISALIGNED, OVERFLOW, BARRIER, MASKS, STACK_WRITE, MUCH_SHARED };
using Sums = int[64];
using Much = int[12 * 1024 - 63];  // with these

// Each in the last thread of a block, but for the masks
void planted_kernel(int* out, int n, int bug) {
  SHARED(Sums, sums);
  const int thread = threadIdx.x;
  const bool last = thread == n - 1;
  int own[4] = {};
  sums[thread] = 1;
  if (last && bug == SHARED_WRITE) *(&sums[0] + 64) = 1;
  if (last && bug == MISALIGNED) sums[0] = reinterpret_cast<uint4*>(out + 1)->x;
  if (last && bug == OVERFLOW) sums[0] = INT32_MAX, sums[0] += thread;
  if (last && bug == BARRIER) __syncwarp(1u << thread % 32 | 1u);
  if (last && bug == MUCH_SHARED) {
    SHARED(Much, much);
    much[0] = 1;
  }
  if (bug == MASKS && thread < 3) __syncwarp(thread ? 7u : 3u);
  __syncthreads();
  int* volatile place = own;
  place[last && bug == STACK_WRITE ? 4 : 0] = 0;
  int sum = thread < 32 ? sums[thread] + (thread + 32 < n ? sums[thread + 32] : 0) : 0;
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (thread < 32) atomicAdd(&out[thread], __shfl_sync(~0u, sum, 0) + __popc(__ballot_sync(~0u, thread % 2)));
  if (last && bug == GLOBAL_WRITE) out[n] = 1;
}

enum Dropped { NOTHING, WRITTEN, READ, LANES };

// Every thread adds up, in turns, what a thread of another warp and one of its own hold, but for a barrier.
void barriers_kernel(int* out, int n, int dropped) {
  SHARED(Sums, held);
  const int thread = threadIdx.x, neighbour = thread / 32 * 32 + (thread + 1) % 32;
  int sum = 0;
  for (int turn = 1; turn <= 3; ++turn) {
    held[thread] = turn * thread;
    if (dropped != WRITTEN) __syncthreads();
    sum += held[(thread + 32) % n];
    if (dropped != READ) __syncthreads();
    held[thread] = turn;
    if (dropped != LANES) __syncwarp();
    sum += held[neighbour];
    __syncwarp();
  }
  out[thread] = sum;
}

}  // namespace

void run(const Arguments& a, int64_t*) {
  const Array& out = a["out"];
  const int n = static_cast<int>(out.shape[0]), bug = a.integer("bug");
  const auto kernel = a.integer("barriers") ? barriers_kernel : planted_kernel;
  emulation::launch({1}, {static_cast<unsigned>(n)}, a.seed(), kernel, reinterpret_cast<int*>(out.data), n, bug);
}
