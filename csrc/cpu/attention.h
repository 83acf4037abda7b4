// What every variant of the CPU attention takes, and the loops all of them share (attention_variant.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "bfloat16.h"

namespace tokenops::attention {

enum class Type { Float, BFloat16, Half };

// (B,H,rows,D), channels side by side; strides in elements
struct Rows {
  char* data;
  int64_t stride_b, stride_h, stride_n;
};

// One call, or one sequence of a packed one. Masks, bias, lengths, lse and scores may be null. Scores are the
// probabilities of query 0 or, `received`, the mean over the queries. The queries of a head are worked on in `splits`
// parts. A head has lse and its gradient `across_m` behind those of the head before, scores and gradients of the bias
// `across_n`: M and N, or the rows of all sequences.
struct Problem {
  Type type;
  int64_t H, M, N, DK, DV, splits, across_m, across_n;
  Rows q, k, v, out;
  const float *qk_mask, *v_mask, *bias;
  int64_t bias_b, bias_h, bias_n;
  const int64_t* lengths;
  float scale;
  bool received;
  float *lse, *scores;

  int64_t size_of_element() const { return type == Type::Float ? 4 : 2; }
  char* head(const Rows& rows, int64_t b, int64_t h) const {
    return rows.data + (b * rows.stride_b + h * rows.stride_h) * size_of_element();
  }
};

// What the backward pass takes besides (lse is read): gradients of out, scores (a query's share; may be null) and lse
// (may be null), and where to write. dqk_mask and dv_mask, (B,H,D), and dbias may be null.
struct Gradients {
  Rows dout;
  const float *dscores, *dlse;
  Rows dq, dk, dv;
  float *dqk_mask, *dv_mask, *dbias;
};

constexpr float NONE = -std::numeric_limits<float>::infinity();  // the logit of a key that does not count

struct Variant {
  const char* name;
  void (*attend)(const Problem&, int32_t*, int64_t, int64_t);
  void (*attend_backward)(const Problem&, const Gradients&, int32_t*, int64_t, int64_t);
  void (*mean_keys)(const Problem&, char*, int64_t, int64_t);
  int64_t (*words)(const Problem&);  // of scratch
  int64_t (*words_backward)(const Problem&);
  int64_t width;
};

// The best for the dtype that may be used.
Variant choose(Type type);

// half precision is converted by its own functions, not inlined (float16.cpp's are as good as any here)
void from_half(const void* in, float* out, int64_t n);
void to_half(const float* in, void* out, int64_t n);

}  // namespace tokenops::attention
