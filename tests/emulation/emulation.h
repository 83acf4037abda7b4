// Runs CUDA device code on the host: include this before a .cuh, then call launch(). Blocks run one after another; the
// threads of a block are fibers that switch at barriers, warp operations and atomics, in an order chosen by `seed`.
// Shared memory is a heap allocation of the block, filled with 0xCD, so the sanitizers see every overrun of it.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED(type, name) \
  type& name = *static_cast<type*>(emulation::shared([] { static char key; return &key; }(), sizeof(type)))
#define DYNAMIC_SHARED(type, name, count) \
  type* const name = static_cast<type*>(emulation::shared([] { static char key; return &key; }(), sizeof(type) * (count)))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK = 1 << 16;
constexpr unsigned WARP = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;
  dim3 index;
  unsigned thread;
  bool done;
};

struct Warp {
  uint64_t slot[WARP];         // what each lane offers the others
  unsigned there = 0;          // lanes that exist
  unsigned arrived = 0;        // lanes that wait
  unsigned passed[WARP] = {};  // how often each lane was let through
};

struct Block {
  unsigned alive = 0, arrived = 0, passed = 0;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Block block;
inline Fiber* self;
inline ucontext_t scheduler;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline std::function<void()> kernel;
inline std::exception_ptr failure;
inline bool progress;

inline void yield(bool last = false) {
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

template <typename Condition>
void wait(const Condition& condition) {
  while (!condition()) yield();
  progress = true;
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  try {
    kernel();
  } catch (...) {
    failure = std::current_exception();
  }
  self->done = progress = true;
  --block.alive;
  yield(true);
}

inline void resume(Fiber& fiber) {
  void* fake_stack = nullptr;
  self = &fiber;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), STACK);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

inline void run_block(unsigned threads, unsigned seed) {
  block = Block{};
  block.alive = threads;
  block.warps.resize((threads + WARP - 1) / WARP);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<Fiber*> order;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    __asan_unpoison_memory_region(fiber.stack.get(), STACK);
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    fiber.thread = t, fiber.done = false, fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
    block.warps[t / WARP].there |= 1u << t % WARP;
    order.push_back(&fiber);
  }
  std::mt19937 random(seed);
  while (block.alive) {
    progress = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (Fiber* fiber : order) {
      if (!fiber->done) resume(*fiber);
    }
    if (!progress) throw std::runtime_error("deadlock: the threads of a block wait at different places");
  }
}

// kernel<<<grid, threads>>>(args...); seed 0 keeps the threads in order, others shuffle them at every switch.
template <typename Kernel, typename... Args>
void launch(dim3 grid, dim3 threads, unsigned seed, Kernel* function, const Args&... args) {
  kernel = [&] { function(args...); };
  gridDim = grid, blockDim = threads;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads.x * threads.y * threads.z, seed);
}

inline void* shared(const void* key, size_t bytes) {
  auto& memory = block.shared[key];
  if (!memory) {
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xCD, bytes);
  }
  return memory.get();
}

inline Warp& warp() { return block.warps[self->thread / WARP]; }
inline unsigned lane() { return self->thread % WARP; }

inline void sync_warp(unsigned mask) {
  Warp& w = warp();
  const unsigned l = lane(), passed = w.passed[l];
  if (!(mask >> l & 1)) throw std::runtime_error("a lane takes part in a warp operation whose mask leaves it out");
  mask &= w.there;
  w.arrived |= 1u << l;
  wait([&] {
    if (w.passed[l] == passed && (w.arrived & mask) == mask) {
      w.arrived &= ~mask;
      for (unsigned i = 0; i < WARP; ++i) w.passed[i] += mask >> i & 1;
    }
    return w.passed[l] != passed;
  });
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  std::memcpy(&w.slot[lane()], &value, sizeof(T));
  sync_warp(mask);
  if (source < WARP && !(mask & w.there & 1u << source)) {
    throw std::runtime_error("a warp shuffle reads a lane that is not there");
  }
  if (source < WARP) std::memcpy(&value, &w.slot[source], sizeof(T));
  sync_warp(mask);
  return value;
}

// The lane that `lane` reads within its group of `width`, itself (no lane: WARP) where that leaves the group
inline unsigned within(unsigned source, int width) { return source / width == lane() / width ? source : WARP; }

template <typename T, typename F>
T atomic(T* address, const F& update) {
  const T before = *address;
  *address = update(before);
  yield();
  progress = true;
  return before;
}

}  // namespace emulation

inline void __syncthreads() {
  using emulation::block;
  const unsigned passed = block.passed;
  ++block.arrived;
  emulation::wait([&] {
    if (block.passed == passed && block.arrived == block.alive) block.arrived = 0, ++block.passed;
    return block.passed != passed;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::exchange(mask, value, emulation::lane() / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulation::exchange(mask, value, emulation::within(emulation::lane() ^ bits, width));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::exchange(mask, value, emulation::within(emulation::lane() - delta, width));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::exchange(mask, value, emulation::within(emulation::lane() + delta, width));
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  emulation::Warp& w = emulation::warp();
  w.slot[emulation::lane()] = vote;
  emulation::sync_warp(mask);
  for (unsigned i = 0; i < emulation::WARP; ++i) votes |= (mask & w.there) >> i & 1 ? unsigned(w.slot[i]) << i : 0;
  emulation::sync_warp(mask);
  return votes;
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulation::atomic(address, [&](T before) { return std::max(before, value); });
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulation::atomic(address, [&](T before) { return std::min(before, value); });
}
template <typename T>
T atomicAdd(T* address, T value) {
  return emulation::atomic(address, [&](T before) { return before + value; });
}
