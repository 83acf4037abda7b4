// sum_rows on a CPU: one pass over the rows of the result, each copied, or summed from those that go there, which lie
// one behind the other in `order`. What very many go to is summed in parts of PART, by all threads.
#include "../sum_rows.h"
#include "vector_rows.h"

#include <stdexcept>
#include <string>

namespace tokenops {
namespace {

constexpr int64_t PART = 256;

const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

// torch makes std::out_of_range Python's IndexError; thrown from here, not from where threads are
void check_order(const Tensor& order, const Tensor& offsets, int64_t T) {
  const int64_t *const rows = integers(order), *const ends = integers(offsets);
  for (int64_t i = 0; i < order.size(0); ++i) {
    if (rows[i] < 0 || rows[i] >= T) throw std::out_of_range("sum_rows: order[" + std::to_string(i) + "] is no row");
  }
  for (int64_t m = 0; m < offsets.size(0); ++m) {
    if (ends[m] < (m ? ends[m - 1] : 0) || ends[m] > order.size(0)) {
      throw std::out_of_range("sum_rows: offsets[" + std::to_string(m) + "] is no place in the order");
    }
  }
}

// The parts that are summed before: part i of row m is begins[m] + i
struct Parts {
  std::vector<int64_t> begins, rows;

  Parts(const int64_t* offsets, int64_t M) : begins(M + 1) {
    for (int64_t m = 0; m < M; ++m) {
      begins[m] = static_cast<int64_t>(rows.size());
      const int64_t count = offsets[m + 1] - offsets[m];
      if (count >= 2 * PART) rows.insert(rows.end(), count / PART, m);
    }
    begins[M] = static_cast<int64_t>(rows.size());
  }
  int64_t of(int64_t m) const { return begins[m + 1] - begins[m]; }
};

template <typename T, typename Wide>
void sum_rows(const Tensor& x, const Wide* weight, const int64_t* order, const int64_t* offsets, bool mean, bool norm,
              const Norm<T, Wide>& affine, const SummedRows& out) {
  const int64_t M = out.y.size(0), C = x.size(1), room = (C + PAIRED - 1) / PAIRED * PAIRED;
  const Strided from = strided_rows(x);
  const Row row{C, sizeof(T)};
  const Parts parts(offsets, M);
  std::vector<Wide> summed(parts.rows.size() * room);
  const auto counts = [&](int64_t n) { return weight ? weight[n] : Wide{1}; };
  const auto add = [&](RowSum<T, Wide>& sum, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sum.add(from.data + order[i] * from.stride_n, from.stride_c, counts(order[i]));
    }
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.rows.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t m = parts.rows[p], first = offsets[m] + (p - parts.begins[m]) * PART;
      RowSum<T, Wide> sum(C);
      add(sum, first, first + PART);
      std::copy_n(sum.values, room, summed.data() + p * room);
    }
  });

  T *const y = static_cast<T*>(out.y.data_ptr()), *const normed = static_cast<T*>(out.normed.data_ptr());
  Wide* const totals = static_cast<Wide*>(out.totals.data_ptr());
  Wide *const means = static_cast<Wide*>(out.statistics.data_ptr()), *const deviations = means + M;
  for_rows(1, M, C * row.bytes, [&](int64_t m, int64_t, int64_t) {
    char* const target = reinterpret_cast<char*>(y + m * C);
    const int64_t first = offsets[m], last = offsets[m + 1], count = last - first;
    Wide total = 0;
    for (int64_t i = first; i < last; ++i) total += counts(order[i]);
    totals[m] = total;
    const bool whole = count == 1 && (total == 1 || (mean && total != 0));  // then it is not rounded
    if (whole) {
      row.copy(target, from.data + order[first] * from.stride_n, from.stride_c);
    } else if (count == 0) {
      row.zero(target);
    } else {
      RowSum<T, Wide> sum(C);
      for (int64_t p = parts.begins[m]; p < parts.begins[m + 1]; ++p) {
        add_scaled(sum.values, summed.data() + p * room, Wide{1}, room);
      }
      add(sum, first + parts.of(m) * PART, last);
      sum.store(y + m * C, mean && total != 0 ? total : Wide{1});
    }
    if (norm) normalize(y + m * C, normed + m * C, C, affine, means + m, deviations + m);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sum_rows_fwd(Tensor x, Tensor dest, int64_t rows,
                                                        std::optional<Tensor> weight, Tensor order, Tensor offsets,
                                                        int64_t, std::optional<Tensor> factor,
                                                        std::optional<Tensor> bias, bool mean, bool norm, double eps) {
  const SummedRows out(x, dest, rows, weight, order, offsets, norm);
  check_order(order, offsets, x.size(0));
  with_float(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Norm<T, Wide> affine(norm, factor, bias, x, eps);
    const Wide* const weights = weight ? static_cast<const Wide*>(weight->data_ptr()) : nullptr;
    sum_rows(x, weights, integers(order), integers(offsets), mean, norm, affine, out);
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor> sum_rows_bwd(Tensor dy, Tensor dest, std::optional<Tensor> weight,
                                        std::optional<Tensor> totals, std::optional<Tensor> x) {
  const GatheredRows out(dy, dest, weight, totals, x);
  const int64_t C = dy.size(1), M = dy.size(0), *const places = integers(dest);
  const Strided from = strided_rows(dy), others = x ? strided_rows(*x) : Strided{};
  with_float(dy.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Wide* const weights = weight ? static_cast<const Wide*>(weight->data_ptr()) : nullptr;
    const Wide* const sums = totals ? static_cast<const Wide*>(totals->data_ptr()) : nullptr;
    T* const dx = static_cast<T*>(out.dx.data_ptr());
    Wide* const dots = static_cast<Wide*>(out.dots.data_ptr());
    const Row row{C, sizeof(T)};
    for_rows(1, out.dx.size(0), C * row.bytes, [&](int64_t n, int64_t, int64_t) {
      char* const target = reinterpret_cast<char*>(dx + n * C);
      const int64_t m = places[n];
      if (m < 0 || m >= M) {
        row.zero(target);
        if (x) dots[n] = 0;
        return;
      }
      const char* const upstream = from.data + m * from.stride_n;
      const Wide total = sums && sums[m] != 0 ? sums[m] : Wide{1}, share = (weights ? weights[n] : Wide{1}) / total;
      if (x) {
        Wide* const room = room_for<Wide>(2 * C);
        const Wide* const a = widened<T>(others.data + n * others.stride_n, others.stride_c, C, room);
        const Wide* const b = widened<T>(upstream, from.stride_c, C, room + C);
        dots[n] = dot(a, b, C) / total;
      }
      if (share == 1) return row.copy(target, upstream, from.stride_c);
      RowSum<T, Wide> scaled(C);
      scaled.add(upstream, from.stride_c, share);
      scaled.store(dx + n * C);
    });
  });
  return out.tuple();
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("sum_rows_fwd.native", TORCH_BOX(&tokenops::sum_rows_fwd));
  m.impl("sum_rows_bwd.native", TORCH_BOX(&tokenops::sum_rows_bwd));
}
