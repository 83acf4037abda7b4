// Runs CUDA device code on the host: include this before a .cuh, then call launch(). Blocks run one after another; the
// threads of a block are fibers. A warp runs until each of its lanes waits or is done, then another one, so that warps
// drift as far apart as the barriers let them; its lanes switch where they wait, and at atomics. `seed` chooses who is
// next. Shared memory is a heap allocation of the block, filled with 0xCD, so the sanitizers see every overrun of it.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_BYTES(bytes) emulation::shared([] { static char key; return &key; }(), bytes)
#define SHARED(type, name) type& name = *static_cast<type*>(SHARED_BYTES(sizeof(type)))
#define DYNAMIC_SHARED(type, name, count) \
  type* const name = static_cast<type*>(SHARED_BYTES(sizeof(type) * (count)))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK = 1 << 16;
constexpr unsigned WARP = 32;
constexpr size_t SHARED_MEMORY = 48 * 1024;  // that a block may have unasked

struct Fiber {
  ucontext_t context;
  void* resumed[5];  // where it goes on, as __builtin_setjmp has it
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;
  bool started = false;
  dim3 index;
  unsigned thread;
  uint64_t offered = 0, received = 0;  // what this lane offers the others, and what it got of lane `source`
  unsigned mask, source, votes;        // votes: the lowest bit of what each lane offered
};

struct Warp {
  unsigned there = 0;    // lanes that exist,
  unsigned ready = 0;    // can go on,
  unsigned arrived = 0;  // wait for others of their warp,
  unsigned stopped = 0;  // or wait for the block
};

struct Block {
  unsigned alive = 0, arrived = 0;
  size_t taken = 0;  // bytes of shared memory
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Block block;
inline Fiber* self;
inline void* scheduler[5];
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline void (*kernel)(const void*);
inline const void* arguments;
inline std::exception_ptr failure;
inline bool warp_goes_on;
inline uint64_t random_state;

// Below n; splitmix64
inline unsigned random(unsigned n) {
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<unsigned>((z >> 33) % n);
}

inline Warp& warp() { return block.warps[self->thread / WARP]; }
inline unsigned lane() { return self->thread % WARP; }

// swapcontext without its system call, and without ASan's longjmp, which forgets what is poisoned on the stack. In one
// function the compiler would think that nothing comes back.
#define SWITCHES __attribute__((noipa, no_sanitize("address", "undefined"))) inline
SWITCHES void go_on(void** to) { __builtin_longjmp(to, 1); }
SWITCHES void jump(void** from, void** to) {
  if (!__builtin_setjmp(from)) go_on(to);
}
SWITCHES void start(void** from, const ucontext_t* to) {
  if (!__builtin_setjmp(from)) setcontext(to);
}

inline void yield() {
  __sanitizer_start_switch_fiber(&self->fake_stack, scheduler_stack, scheduler_stack_size);
  jump(self->resumed, scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

inline void release_block() {
  if (!block.arrived || block.arrived != block.alive) return;
  for (Warp& w : block.warps) w.ready |= std::exchange(w.stopped, 0);
  block.arrived = 0;
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {  // a kernel after the other
    try {
      kernel(arguments);
    } catch (...) {
      failure = std::current_exception();
    }
    --block.alive;
    release_block();
    yield();
  }
}

inline void resume(Fiber& fiber) {
  void* fake_stack = nullptr;
  self = &fiber;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), STACK);
  if (std::exchange(fiber.started, true)) jump(scheduler, fiber.resumed);
  else start(scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

inline Fiber& fiber_of(unsigned thread) {
  if (thread == fibers.size()) {
    Fiber& fiber = *fibers.emplace_back(std::make_unique<Fiber>());
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
  }
  return *fibers[thread];
}

inline void run_block(unsigned threads) {
  block = Block{};
  block.alive = threads;
  block.warps.resize((threads + WARP - 1) / WARP);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fiber_of(t);
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    fiber.thread = t;
    block.warps[t / WARP].there |= 1u << t % WARP;
  }
  for (Warp& w : block.warps) w.ready = w.there;
  while (block.alive) {
    std::vector<unsigned> ready;
    for (unsigned w = 0; w < block.warps.size(); ++w) {
      if (block.warps[w].ready) ready.push_back(w);
    }
    if (ready.empty()) throw std::runtime_error("deadlock: the threads of a block wait at different places");
    const unsigned chosen = ready[random(ready.size())];
    Warp& w = block.warps[chosen];
    for (warp_goes_on = true; w.ready && warp_goes_on;) {
      unsigned lanes = w.ready;
      for (unsigned skip = random(__builtin_popcount(lanes)); skip; --skip) lanes &= lanes - 1;
      const unsigned next = __builtin_ctz(lanes);
      w.ready &= ~(1u << next);
      resume(*fibers[chosen * WARP + next]);
    }
  }
}

// kernel<<<grid, threads>>>(args...)
template <typename Kernel, typename... Args>
void launch(dim3 grid, dim3 threads, uint64_t seed, Kernel* function, const Args&... args) {
  const auto call = [&] { function(args...); };
  kernel = [](const void* call_of) { (*static_cast<decltype(call)*>(call_of))(); };
  arguments = &call;
  random_state = seed;
  gridDim = grid, blockDim = threads;
  try {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads.x * threads.y * threads.z);
  } catch (...) {
    fibers.clear();  // they are amid the kernel
    throw;
  }
}

inline void* shared(const void* key, size_t bytes) {
  auto& memory = block.shared[key];
  if (!memory) {
    block.taken += bytes;
    if (block.taken > SHARED_MEMORY) throw std::runtime_error("a block takes more than 48 KB of shared memory");
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xCD, bytes);
  }
  return memory.get();
}

// Waits for the other lanes of `mask`. Each of them then has what it needs of the others, so that none waits again.
inline void sync_warp(unsigned mask) {
  Warp& w = warp();
  const unsigned first = self->thread - lane();
  if (!(mask >> lane() & 1)) {
    throw std::runtime_error("a lane takes part in a warp operation whose mask leaves it out");
  }
  self->mask = mask &= w.there;
  w.arrived |= 1u << lane();
  if ((w.arrived & mask) == mask) {
    unsigned votes = 0;
    for (unsigned i = 0; i < WARP; ++i) {
      if (mask >> i & 1) votes |= (fibers[first + i]->offered & 1u) << i;
    }
    for (unsigned i = 0; i < WARP; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& fiber = *fibers[first + i];
      if (fiber.mask != mask) throw std::runtime_error("lanes of a warp wait for each other with different masks");
      fiber.votes = votes, fiber.received = fibers[first + fiber.source]->offered;
    }
    w.arrived &= ~mask;
    w.ready |= mask;
  }
  yield();
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  if (source < WARP && !(mask & warp().there & 1u << source)) {
    throw std::runtime_error("a warp shuffle reads a lane that is not there");
  }
  std::memcpy(&self->offered, &value, sizeof(T));
  self->source = source < WARP ? source : lane();
  sync_warp(mask);
  std::memcpy(&value, &self->received, sizeof(T));
  return value;
}

// The lane that `lane` reads within its group of `width`, itself (no lane: WARP) where that leaves the group
inline unsigned within(unsigned source, int width) { return source / width == lane() / width ? source : WARP; }

// By chance the thread goes on after it, or another one of its warp, or another warp.
template <typename T, typename F>
T atomic(T* address, const F& update) {
  const T before = *address;
  *address = update(before);
  if (const unsigned next = random(8); next < 4) {
    warp().ready |= 1u << lane();
    warp_goes_on = next;
    yield();
  }
  return before;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::warp().stopped |= 1u << emulation::lane();
  ++emulation::block.arrived;
  emulation::release_block();
  emulation::warp_goes_on = emulation::block.arrived;
  emulation::yield();
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncwarp(unsigned mask = ~0u) {
  emulation::self->source = emulation::lane();
  emulation::sync_warp(mask);
}

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
  emulation::self->offered = vote;
  __syncwarp(mask);
  return emulation::self->votes;
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
