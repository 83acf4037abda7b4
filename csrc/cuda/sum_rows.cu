// Launches of sum_rows.cuh.
#include "sum_rows.cuh"

#include "../sum_rows.h"
#include "launch.h"

namespace tokenops {
namespace {

const char* const OP = "sum_rows";

const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

void check_width(const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) * static_cast<int64_t>(x.element_size()) <= INT_MAX / 2, "channels exceed 2^30");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sum_rows_fwd(Tensor x, Tensor dest, int64_t rows,
                                                        std::optional<Tensor> weight, Tensor order, Tensor offsets,
                                                        int64_t most, std::optional<Tensor> factor,
                                                        std::optional<Tensor> bias, bool mean, bool norm, double eps) {
  const SummedRows out(x, dest, rows, weight, order, offsets, norm);
  check_width(x);
  const OnDevice on(OP, x);
  const int64_t windows = most >= PART ? order.size(0) / PART : 0;
  STD_TORCH_CHECK(windows <= INT_MAX / 1024, "too many rows for one launch");
  SumRows p{};
  p.x = strided_rows(x), p.y = strided_rows(out.y);
  p.dest = integers(dest), p.order = integers(order), p.offsets = integers(offsets);
  p.weight = weight ? weight->data_ptr() : nullptr, p.mean = mean, p.totals = out.totals.data_ptr();
  p.norm = norm_of(norm, x, out.normed, out.statistics, factor, bias, eps);
  p.sources = x.size(0), p.rows = rows, p.C = x.size(1), p.windows = windows;
  const Tensor parts = new_tensor(x, {windows, p.C}, wide_type(x)), shares = new_tensor(x, {windows}, wide_type(x));
  if (windows) p.parts = parts.data_ptr(), p.shares = shares.data_ptr();
  const Plan chosen = plan(p, static_cast<int64_t>(x.element_size()), on.multiprocessors);
  launch(OP, chosen, x, [&](auto type) {
    using T = decltype(type);
    constexpr int V = MOST_IN_PACK<T>;
    const dim3 grid(static_cast<unsigned>(chosen.blocks)), before(static_cast<unsigned>(windows * p.slices));
    const bool wide = chosen.width == 16;
    if (windows && wide) packed_parts_kernel<T, V><<<before, THREADS, 0, on.stream>>>(p);
    else if (windows) packed_parts_kernel<T, 1><<<before, THREADS, 0, on.stream>>>(p);
    if (wide && norm) packed_sums_kernel<T, V, true><<<grid, THREADS, 0, on.stream>>>(p);
    else if (wide) packed_sums_kernel<T, V, false><<<grid, THREADS, 0, on.stream>>>(p);
    else if (norm) packed_sums_kernel<T, 1, true><<<grid, THREADS, 0, on.stream>>>(p);
    else packed_sums_kernel<T, 1, false><<<grid, THREADS, 0, on.stream>>>(p);
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor> sum_rows_bwd(Tensor dy, Tensor dest, std::optional<Tensor> weight,
                                        std::optional<Tensor> totals, std::optional<Tensor> x) {
  const GatheredRows out(dy, dest, weight, totals, x);
  check_width(dy);
  const OnDevice on(OP, dy);
  GatherRows p{};
  p.dy = strided_rows(dy), p.dx = strided_rows(out.dx), p.dest = integers(dest), p.dots = out.dots.data_ptr();
  if (x) p.x = strided_rows(*x);
  p.weight = weight ? weight->data_ptr() : nullptr, p.totals = totals ? totals->data_ptr() : nullptr;
  p.rows = dest.size(0), p.given = dy.size(0), p.C = dy.size(1);
  const Plan chosen = plan(p, static_cast<int64_t>(dy.element_size()), on.multiprocessors);
  launch(OP, chosen, dy, [&](auto type) {
    using T = decltype(type);
    constexpr int V = MOST_IN_PACK<T>;
    const dim3 grid(static_cast<unsigned>(chosen.blocks));
    if (chosen.width == 16 && x) packed_gather_kernel<T, V, true><<<grid, THREADS, 0, on.stream>>>(p);
    else if (chosen.width == 16) packed_gather_kernel<T, V, false><<<grid, THREADS, 0, on.stream>>>(p);
    else if (x) packed_gather_kernel<T, 1, true><<<grid, THREADS, 0, on.stream>>>(p);
    else packed_gather_kernel<T, 1, false><<<grid, THREADS, 0, on.stream>>>(p);
  });
  return out.tuple();
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CUDA, m) {
  m.impl("sum_rows_fwd.native", TORCH_BOX(&tokenops::sum_rows_fwd));
  m.impl("sum_rows_bwd.native", TORCH_BOX(&tokenops::sum_rows_bwd));
}
