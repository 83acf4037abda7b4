// Launches of restore_tokens.cuh.
#include "restore_tokens.cuh"

#include "launch.h"

namespace tokenops {
namespace {

const char* const OP = "restore_tokens";

template <typename Unit>
void launch_as(const RestoreTokens& p, const RestorePlan& plan, bool backward, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(plan.x, plan.y);
  if (backward) restore_tokens_bwd_kernel<Unit><<<grid, block, 0, stream>>>(p);
  else restore_tokens_fwd_kernel<Unit><<<grid, block, 0, stream>>>(p);
}

using Tensors = std::vector<Tensor>;

void run(const Tensor& base, const Tensor& tokens, const Tensor& y, const Tensor& index, int64_t prefix,
         const Tensors& olds, const Tensors& news, const Tensors& results, bool backward) {
  const int64_t B = base.size(0), rows = base.size(1), C = base.size(2), k = index.size(1);
  const int64_t element = static_cast<int64_t>(base.element_size());
  STD_TORCH_CHECK(tokens.size(1) <= INT_MAX / 2 && C * element <= INT_MAX / 2, "tokens or channels exceed 2^30");
  if (B == 0 || (rows == 0 && tokens.size(1) == 0)) return;
  const OnDevice on(OP, base);
  RestoreTokens p{};
  p.base = strided(base), p.tokens = strided(tokens), p.y = strided(y);
  p.index = static_cast<const int64_t*>(index.data_ptr()), p.stride_ib = index.stride(0), p.stride_ik = index.stride(1);
  p.companions_given = static_cast<int>(olds.size());
  for (size_t c = 0; c < olds.size(); ++c) {
    const int bytes = static_cast<int>(olds[c].element_size());
    p.companions[c] = {companion(olds[c]), companion(news[c]), companion(results[c]), bytes};
  }
  p.B = B, p.rows = rows, p.C = C, p.prefix = prefix;
  p.k = static_cast<int>(k), p.carried = static_cast<int>(tokens.size(1) - k);
  const RestorePlan chosen = plan(p, element, on.multiprocessors);
  if (!checked(chosen)) return;
  with_unit(chosen.width, [&](auto unit) { launch_as<decltype(unit)>(p, chosen, backward, on.stream); });
  check_cuda(OP, cudaGetLastError());
}

std::tuple<Tensor, Tensors> restore_tokens_fwd(Tensor base, Tensor tokens, Tensor index, int64_t prefix, Tensors olds,
                                               Tensors news) {
  check_rows("tokens", tokens, base);
  check_index("index", index, base);
  check_carried(tokens.size(1) - index.size(1), prefix, base.size(1));
  check_pairs(olds, news, base, base.size(1) - prefix, index.size(1));
  Tensor y = new_tensor(base, {base.size(0), base.size(1), base.size(2)});
  Tensors made;
  for (const Tensor& old : olds) made.push_back(new_tensor(old, {old.size(0), old.size(1)}));
  run(base, tokens, y, index, prefix, olds, news, made, false);
  return {y, made};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> restore_tokens_bwd(Tensor dy, Tensor index, int64_t prefix,
                                                                int64_t carried, Tensors dcompanions) {
  check_rows("dy", dy, dy);
  check_index("index", index, dy);
  check_carried(carried, prefix, dy.size(1));
  check_companions("dcompanions", dcompanions, dy, dy.size(1) - prefix);
  Tensor dbase = new_tensor(dy, {dy.size(0), dy.size(1), dy.size(2)});
  Tensor dtokens = new_tensor(dy, {dy.size(0), carried + index.size(1), dy.size(2)});
  Tensors dolds, dnews;
  for (const Tensor& d : dcompanions) {
    dolds.push_back(new_tensor(d, {d.size(0), d.size(1)}));
    dnews.push_back(new_tensor(d, {d.size(0), index.size(1)}));
  }
  run(dbase, dtokens, dy, index, prefix, dolds, dnews, dcompanions, true);
  return {dbase, dtokens, dolds, dnews};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("restore_tokens_fwd.native", TORCH_BOX(&tokenops::restore_tokens_fwd));
  m.impl("restore_tokens_bwd.native", TORCH_BOX(&tokenops::restore_tokens_bwd));
}
