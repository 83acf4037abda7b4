// masked_channel_attention on a CPU, forward and backward: one head after the other, its keys and values packed once,
// never more than a block of queries' probabilities in memory (attention_variant.h).
#include "../common.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "attention.h"

namespace tokenops {
namespace {

using attention::Gradients;
using attention::Problem;
using attention::Variant;
using torch::headeronly::ScalarType;

attention::Rows heads(const char* name, const Tensor& x, const Tensor& q, int64_t rows, int64_t channels) {
  STD_TORCH_CHECK(!x.is_cuda() && x.dim() == 4 && x.scalar_type() == q.scalar_type(), name, " must be (B, H, N, D) like q");
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == rows && x.size(3) == channels, name,
                  " has the wrong shape");
  STD_TORCH_CHECK(x.stride(3) == 1 || channels == 1 || x.numel() == 0, name, " must have its channels side by side");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

const float* floats(const char* name, const std::optional<Tensor>& x, int64_t rows, int64_t columns) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(!x->is_cuda() && x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(0) == rows &&
                      x->size(1) == columns && x->is_contiguous(),
                  name, " must be (H, D), float32, contiguous");
  return static_cast<const float*>(x->data_ptr());
}

float* filled(const char* name, Tensor& x, int64_t size) {
  STD_TORCH_CHECK(!x.is_cuda() && x.scalar_type() == ScalarType::Float && x.numel() == size && x.is_contiguous(), name,
                  " must be float32, contiguous, of the right size");
  return static_cast<float*>(x.data_ptr());
}

attention::Type type_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return attention::Type::Float;
  if (x.scalar_type() == ScalarType::BFloat16) return attention::Type::BFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "attention takes float16, bfloat16 and float32");
  return attention::Type::Half;
}

// What both passes take, checked. Scores and the like are set by the caller.
Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& qk_mask,
                const std::optional<Tensor>& v_mask, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& lengths, double scale, Tensor& lse) {
  const int64_t B = q.size(0), H = q.size(1), M = q.size(2), N = k.size(2), DK = q.size(3), DV = v.size(3);
  Problem p{};
  p.type = type_of(q), p.H = H, p.M = M, p.N = N, p.DK = DK, p.DV = DV, p.splits = 1;
  p.q = heads("q", q, q, M, DK), p.k = heads("k", k, q, N, DK), p.v = heads("v", v, q, N, DV);
  p.qk_mask = floats("qk_mask", qk_mask, H, DK), p.v_mask = floats("v_mask", v_mask, H, DV);
  if (bias) {
    STD_TORCH_CHECK(!bias->is_cuda() && bias->scalar_type() == ScalarType::Float && bias->dim() == 3 &&
                        bias->size(0) == B && bias->size(1) == H && bias->size(2) == N,
                    "bias must be (B, H, Nk), float32");
    p.bias = static_cast<const float*>(bias->data_ptr());
    p.bias_b = bias->stride(0), p.bias_h = bias->stride(1), p.bias_n = bias->stride(2);
  }
  if (lengths) {
    STD_TORCH_CHECK(!lengths->is_cuda() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                        lengths->size(0) == B && lengths->is_contiguous(),
                    "lengths must be (B,), int64");
    p.lengths = static_cast<const int64_t*>(lengths->data_ptr());
    for (int64_t b = 0; b < B; ++b) STD_TORCH_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= N, "a length is not in 0..Nk");
  }
  p.scale = static_cast<float>(scale);
  p.lse = filled("lse", lse, B * H * M);
  return p;
}

// Calls body(scratch, begin, end) for tasks in parallel, each thread with scratch of so many words.
template <typename F>
void for_tasks(int64_t tasks, int64_t words, const F& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t align = 64;
    std::unique_ptr<char[]> memory(new char[4 * words + align]);
    char* base = memory.get() + (align - reinterpret_cast<uintptr_t>(memory.get()) % align);
    body(reinterpret_cast<int32_t*>(base), begin, end);
  });
}

// Fills out, lse and (unless it is empty) scores, (B,H,Nk); `variant` names an instruction set, "" for the best.
void attention_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> qk_mask, std::optional<Tensor> v_mask,
                   std::optional<Tensor> bias, std::optional<Tensor> lengths, double scale, bool received, Tensor out,
                   Tensor lse, Tensor scores, std::string variant) {
  Problem p = problem(q, k, v, qk_mask, v_mask, bias, lengths, scale, lse);
  const int64_t heads_of_all = q.size(0) * p.H;
  p.out = heads("out", out, q, p.M, p.DV);
  if (scores.numel()) p.scores = filled("scores", scores, heads_of_all * p.N), p.received = received;
  if (heads_of_all * p.M == 0) return;
  const Variant chosen = attention::choose(p.type, variant);
  const int64_t blocks = (p.M + chosen.width - 1) / chosen.width, threads = torch::stable::get_num_threads();
  // few heads: several threads to each, of which every one packs the keys and values
  if (!p.received) p.splits = std::max<int64_t>(1, std::min(blocks, (threads + heads_of_all - 1) / heads_of_all));
  for_tasks(heads_of_all * p.splits, chosen.words(p), [&](int32_t* scratch, int64_t begin, int64_t end) {
    chosen.attend(p, scratch, begin, end);
  });
}

// Fills dq, dk and dv, and dqk_mask and dv_mask, (B,H,D), and dbias, (B,H,Nk), of what there is. dscores, (B,H,Nk), is
// the gradient of a query's probabilities: of query 0, or of all where `received`.
void attention_bwd(Tensor dout, std::optional<Tensor> dscores, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                   std::optional<Tensor> qk_mask, std::optional<Tensor> v_mask, std::optional<Tensor> bias,
                   std::optional<Tensor> lengths, Tensor lse, double scale, bool received, Tensor dq, Tensor dk,
                   Tensor dv, Tensor dqk_mask, Tensor dv_mask, Tensor dbias, std::string variant) {
  Problem p = problem(q, k, v, qk_mask, v_mask, bias, lengths, scale, lse);
  const int64_t heads_of_all = q.size(0) * p.H;
  p.received = received;
  Gradients g{};
  g.dout = heads("dout", dout, q, p.M, p.DV);
  if (dscores) g.dscores = filled("dscores", *dscores, heads_of_all * p.N);
  if (dlse) g.dlse = filled("dlse", *dlse, heads_of_all * p.M);
  g.dq = heads("dq", dq, q, p.M, p.DK), g.dk = heads("dk", dk, q, p.N, p.DK), g.dv = heads("dv", dv, q, p.N, p.DV);
  if (qk_mask) g.dqk_mask = filled("dqk_mask", dqk_mask, heads_of_all * p.DK);
  if (v_mask) g.dv_mask = filled("dv_mask", dv_mask, heads_of_all * p.DV);
  if (bias) g.dbias = filled("dbias", dbias, heads_of_all * p.N);
  if (heads_of_all == 0) return;
  const Variant chosen = attention::choose(p.type, variant);
  for_tasks(heads_of_all, chosen.words_backward(p), [&](int32_t* scratch, int64_t begin, int64_t end) {
    chosen.attend_backward(p, g, scratch, begin, end);
  });
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&tokenops::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&tokenops::attention_bwd));
}
