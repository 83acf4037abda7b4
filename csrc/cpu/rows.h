// Rows of channels on a CPU: copied as they are, and loops over them in parallel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

// The compiler vectorises each function for these machines; the loader takes the best one.
#if defined(__x86_64__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define ALWAYS_INLINE __attribute__((always_inline))

namespace tokenops {
namespace {

constexpr int64_t GRAIN_BYTES = 1 << 15;  // less than this is not worth a second thread

template <typename Unit>
void copy_strided(char* out, const char* in, int64_t C, int64_t out_stride, int64_t in_stride) {
  for (int64_t c = 0; c < C; ++c) std::memcpy(out + c * out_stride, in + c * in_stride, sizeof(Unit));
}

// What a row of C elements needs to be copied into a contiguous one.
struct Row {
  int64_t C, bytes;
  void copy(char* out, const char* in, int64_t in_stride) const {
    if (C == 0) return;  // memcpy takes no null pointers
    if (in_stride == bytes || C == 1) std::memcpy(out, in, C * bytes);
    else if (bytes == 2) copy_strided<int16_t>(out, in, C, bytes, in_stride);
    else if (bytes == 4) copy_strided<int32_t>(out, in, C, bytes, in_stride);
    else copy_strided<int64_t>(out, in, C, bytes, in_stride);
  }
  void zero(char* out) const {
    if (C != 0) std::memset(out, 0, C * bytes);
  }
};

// f(b, begin, end) for the rows of each image after prepare(b), which fills what they need: image by image where there
// are enough of them to keep every thread busy, else all images are prepared first and threads share their rows.
template <typename P, typename F>
void for_images_and_rows(int64_t B, int64_t rows, int64_t row_bytes, int64_t prepare_bytes, const P& prepare,
                         const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t each = std::max<int64_t>(1, rows * row_bytes + prepare_bytes);
  if (B % threads == 0 || B >= 4 * threads) {
    torch::stable::parallel_for(0, B, std::max<int64_t>(1, GRAIN_BYTES / each), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) prepare(b), f(b, 0, rows);
    });
    return;
  }
  for (int64_t b = 0; b < B; ++b) prepare(b);
  const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, B * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end;) {
      const int64_t b = r / rows, stop = std::min(end, (b + 1) * rows);
      f(b, r - b * rows, stop - b * rows);
      r = stop;
    }
  });
}

template <typename F>
void for_rows(int64_t B, int64_t rows, int64_t row_bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN_BYTES / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, B * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin, b = begin / rows, n = begin % rows; r < end; ++r) {
      f(r, b, n);
      if (++n == rows) n = 0, ++b;
    }
  });
}

}  // namespace
}  // namespace tokenops
