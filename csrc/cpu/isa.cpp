#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if TOKENOPS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenops {
namespace {

constexpr const char* NAMES[] = {"amx", "avx512bf16", "avx512", "avx2", "baseline"};
constexpr int COUNT = 5;

bool has(Isa isa) {
#if TOKENOPS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::Amx:
#ifdef TOKENOPS_EMULATED_TILES
      return pairs;
#elif TOKENOPS_TILES
      // and its operating system lets this process use them: ARCH_REQ_XCOMP_PERM, of tile data
      return pairs && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
             syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
      return false;
#endif
    case Isa::Avx512Bf16: return pairs;
    case Isa::Avx512: return avx512;
    case Isa::Avx2: return avx2;
    default: return true;
  }
#else
  return isa == Isa::Baseline;
#endif
}

int place_of(const char* name) {
  for (int i = 0; i < COUNT; ++i)
    if (!std::strcmp(name, NAMES[i])) return i;
  return -1;
}

// The best that may be used: at first what TOKENOPS_CPU_ISA names (Python has refused names that there are not).
std::atomic<int>& most() {
  const char* named = std::getenv("TOKENOPS_CPU_ISA");
  static std::atomic<int> place{named && place_of(named) > 0 ? place_of(named) : 0};
  return place;
}

}  // namespace

bool usable(Isa isa) {
  static const bool here[COUNT] = {has(Isa::Amx), has(Isa::Avx512Bf16), has(Isa::Avx512), has(Isa::Avx2), true};
  const int place = static_cast<int>(isa);
  static std::atomic<int>& best = most();
  return here[place] && place >= best.load(std::memory_order_relaxed);
}

bool slow_pairs() {
#if TOKENOPS_X86
  // but where they are what was named
  return __builtin_cpu_is("intel") && most().load(std::memory_order_relaxed) != static_cast<int>(Isa::Avx512Bf16);
#else
  return false;
#endif
}

}  // namespace tokenops

// For Python: from now on none better than the one of this name; gives the name that this was, null for an unknown one.
extern "C" __attribute__((visibility("default"))) const char* tokenops_limit_cpu_isa(const char* name) {
  const int place = tokenops::place_of(name);
  return place < 0 ? nullptr : tokenops::NAMES[tokenops::most().exchange(place)];
}
