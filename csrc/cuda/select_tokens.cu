// Launches of select_tokens.cuh.
#include "select_tokens.cuh"

#include "../select_tokens.h"
#include "launch.h"

namespace tokenops {
namespace {

const char* const OP = "select_tokens";

template <typename T, int V>
void launch_as(const SelectTokens& p, const Plan& plan, bool backward, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks));
  if (backward) select_tokens_bwd_kernel<T, V><<<grid, THREADS, plan.shared, stream>>>(p);
  else if (p.norm.wanted) select_tokens_fwd_kernel<T, V, true><<<grid, THREADS, plan.shared, stream>>>(p);
  else select_tokens_fwd_kernel<T, V, false><<<grid, THREADS, plan.shared, stream>>>(p);
}

// `like` has the tokens' dtype.
void run(SelectTokens& p, const Tensor& like, const Tensor& scores, bool backward) {
  const int64_t element = static_cast<int64_t>(like.element_size());
  STD_TORCH_CHECK(scores.size(1) <= 16384 && p.C * element <= INT_MAX / 2 && p.prefix <= INT_MAX / 2,
                  "tokens exceed 16384, or channels 2^30");
  const OnDevice on(OP, like);
  p.B = scores.size(0), p.N = static_cast<int>(scores.size(1));
  p.scores = static_cast<const char*>(scores.data_ptr()), p.score_type = float_of(scores);
  p.stride_sb = scores.stride(0), p.stride_sn = scores.stride(1);
  const Plan chosen = plan(p, element, on.multiprocessors, backward);
  launch(OP, chosen, like, [&](auto type) {
    using T = decltype(type);
    if (chosen.width == 16) launch_as<T, MOST_IN_PACK<T>>(p, chosen, backward, on.stream);
    else launch_as<T, 1>(p, chosen, backward, on.stream);
  });
}

void set_companions(SelectTokens& p, const std::vector<Tensor>& from, const std::vector<Tensor>& to) {
  p.companions_given = static_cast<int>(from.size());
  for (size_t c = 0; c < from.size(); ++c) {
    p.companions[c] = {companion(from[c]), companion(to[c]), static_cast<int>(from[c].element_size())};
  }
}

SelectedTuple select_tokens_fwd(Tensor x, Tensor scores, int64_t k, std::optional<Tensor> counts,
                                std::vector<Tensor> companions, std::optional<Tensor> weight,
                                std::optional<Tensor> bias, int64_t prefix, std::string rest, bool best_first,
                                bool norm, double eps) {
  SelectTokens p{};
  p.rest = rest_named(rest);
  Selected out(x, scores, k, prefix, p.rest, norm, companions);
  p.x = strided(x), p.tokens = strided(out.tokens);
  p.norm = norm_of(norm, x, out.normed, out.statistics, weight, bias, eps);
  p.index = static_cast<int64_t*>(out.index.data_ptr());
  p.counts = checked_counts(counts, x);
  p.fused = out.fused.data_ptr();
  set_companions(p, companions, out.companions);
  p.C = x.size(2), p.prefix = prefix, p.k = static_cast<int>(k), p.best_first = best_first;
  if (x.size(0) != 0) run(p, x, scores, false);
  return out.tuple();
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens_bwd(Tensor dtokens, std::vector<Tensor> dcompanions,
                                                                  Tensor index, Tensor scores,
                                                                  std::optional<Tensor> counts, std::optional<Tensor> x,
                                                                  std::optional<Tensor> fused, int64_t prefix,
                                                                  std::string rest) {
  SelectTokens p{};
  p.rest = rest_named(rest);
  check_rows("dtokens", dtokens, dtokens);
  SelectedGradients out(dtokens, dcompanions, index, scores, x, fused, prefix, p.rest);
  if (SelectedGradients::weighted(p.rest)) p.x = strided(*x), p.dscores = static_cast<char*>(out.dscores.data_ptr());
  p.tokens = strided(dtokens), p.dx = strided(out.dx);
  p.index = static_cast<int64_t*>(index.data_ptr()), p.stride_ib = index.stride(0), p.stride_ik = index.stride(1);
  p.counts = checked_counts(counts, dtokens);
  p.fused = fused ? fused->data_ptr() : nullptr;
  set_companions(p, dcompanions, out.dcompanions);
  p.C = dtokens.size(2), p.prefix = prefix, p.k = static_cast<int>(index.size(1));
  if (scores.size(0) != 0) run(p, dtokens, scores, true);
  return out.tuple();
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("select_tokens_fwd.native", TORCH_BOX(&tokenops::select_tokens_fwd));
  m.impl("select_tokens_bwd.native", TORCH_BOX(&tokenops::select_tokens_bwd));
}
