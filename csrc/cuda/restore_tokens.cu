// Launches of restore_tokens.cuh.
#include "restore_tokens.cuh"

#include "../cuda_launch.h"

#include <climits>

namespace tokenops {
namespace {

const char* const OP = "restore_tokens";

template <typename Unit>
void launch(const RestoreTokens& p, const Plan& plan, bool backward, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(plan.x, plan.y);
  if (backward) restore_tokens_bwd_kernel<Unit><<<grid, block, 0, stream>>>(p);
  else restore_tokens_fwd_kernel<Unit><<<grid, block, 0, stream>>>(p);
}

void run(const Tensor& base, const Tensor& tokens, const Tensor& y, const Tensor& index, int64_t prefix,
         bool backward) {
  const int64_t B = base.size(0), rows = base.size(1), C = base.size(2), k = index.size(1);
  const int64_t element = static_cast<int64_t>(base.element_size());
  STD_TORCH_CHECK(tokens.size(1) <= INT_MAX / 2 && C * element <= INT_MAX / 2, "tokens or channels exceed 2^30");
  if (base.numel() == 0 && tokens.numel() == 0) return;
  const OnDevice on(OP, base);
  RestoreTokens p{};
  p.base = strided(base), p.tokens = strided(tokens), p.y = strided(y);
  p.index = static_cast<const int64_t*>(index.data_ptr()), p.stride_ib = index.stride(0), p.stride_ik = index.stride(1);
  p.B = B, p.rows = rows, p.C = C, p.prefix = prefix;
  p.k = static_cast<int>(k), p.carried = static_cast<int>(tokens.size(1) - k);
  const Plan chosen = plan(p, element, on.multiprocessors);
  STD_TORCH_CHECK(chosen.width > 0, "the data is not aligned to its elements");
  STD_TORCH_CHECK(chosen.blocks <= INT_MAX, "too many images for one launch");
  with_unit(chosen.width, [&](auto unit) { launch<decltype(unit)>(p, chosen, backward, on.stream); });
  check_cuda(OP, cudaGetLastError());
}

Tensor restore_tokens_fwd(const Tensor& base, const Tensor& tokens, const Tensor& index, int64_t prefix) {
  check_rows("tokens", tokens, base);
  check_index("index", index, base);
  check_carried(tokens.size(1) - index.size(1), prefix, base.size(1));
  Tensor y = torch::stable::new_empty(base, {base.size(0), base.size(1), base.size(2)});
  if (y.numel() != 0) run(base, tokens, y, index, prefix, false);
  return y;
}

std::tuple<Tensor, Tensor> restore_tokens_bwd(const Tensor& dy, const Tensor& index, int64_t prefix, int64_t carried) {
  check_rows("dy", dy, dy);
  check_index("index", index, dy);
  check_carried(carried, prefix, dy.size(1));
  Tensor dbase = torch::stable::new_empty(dy, {dy.size(0), dy.size(1), dy.size(2)});
  Tensor dtokens = torch::stable::new_empty(dy, {dy.size(0), carried + index.size(1), dy.size(2)});
  run(dbase, dtokens, dy, index, prefix, true);
  return {dbase, dtokens};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("restore_tokens_fwd.native", TORCH_BOX(&tokenops::restore_tokens_fwd));
  m.impl("restore_tokens_bwd.native", TORCH_BOX(&tokenops::restore_tokens_bwd));
}
