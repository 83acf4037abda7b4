// What the CPU's and the GPU's sums of rows share: the checks and the tensors that come out.
#pragma once

#include "companions.h"

namespace tokenops {

// (n,), without gaps, on x's device
inline void check_of_rows(const char* name, const Tensor& t, const Tensor& x, int64_t n, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous(), name, " must have ", n,
                  " entries, side by side");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than it must");
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), name,
                  " must be on the other tensors' device");
}

inline void check_matrix_of_rows(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions");
  check_float(name, x);
}

// (rows, C) of any strides, as one image
inline Strided strided_rows(const Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()), 0, x.stride(0) * bytes, x.stride(1) * bytes};
}

// Like the results of sum_rows_fwd, in its order.
struct SummedRows {
  Tensor y, totals, normed, statistics;

  SummedRows(const Tensor& x, const Tensor& dest, int64_t rows, const std::optional<Tensor>& weight,
             const Tensor& order, const Tensor& offsets, bool norm)
      : SummedRows(x, checked(x, dest, rows, weight, order, offsets), norm) {}

  auto tuple() const { return std::make_tuple(y, totals, normed, statistics); }

 private:
  using Shape = std::vector<int64_t>;

  static int64_t checked(const Tensor& x, const Tensor& dest, int64_t rows, const std::optional<Tensor>& weight,
                         const Tensor& order, const Tensor& offsets) {
    check_matrix_of_rows("x", x);
    STD_TORCH_CHECK(rows >= 0, "rows must be at least 0");
    check_of_rows("dest", dest, x, x.size(0), ScalarType::Long);
    if (weight) check_of_rows("weight", *weight, x, x.size(0), wide_type(x));
    STD_TORCH_CHECK(order.dim() == 1, "order must have 1 dimension");
    check_of_rows("order", order, x, order.size(0), ScalarType::Long);
    check_of_rows("offsets", offsets, x, rows + 1, ScalarType::Long);
    return rows;
  }

  SummedRows(const Tensor& x, int64_t rows, bool norm)
      : y(new_tensor(x, {rows, x.size(1)})),
        totals(new_tensor(x, {rows}, wide_type(x))),
        normed(new_tensor(x, norm ? Shape{rows, x.size(1)} : Shape{0})),
        statistics(new_tensor(x, norm ? Shape{2, rows} : Shape{0}, wide_type(x))) {}
};

// Like the results of sum_rows_bwd, in its order.
struct GatheredRows {
  Tensor dx, dots;

  GatheredRows(const Tensor& dy, const Tensor& dest, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& totals, const std::optional<Tensor>& x)
      : GatheredRows(dy, checked(dy, dest, weight, totals, x), x.has_value()) {}

  auto tuple() const { return std::make_tuple(dx, dots); }

 private:
  static int64_t checked(const Tensor& dy, const Tensor& dest, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& totals, const std::optional<Tensor>& x) {
    check_matrix_of_rows("dy", dy);
    STD_TORCH_CHECK(dest.dim() == 1, "dest must have 1 dimension");
    const int64_t rows = dest.size(0);
    check_of_rows("dest", dest, dy, rows, ScalarType::Long);
    if (weight) check_of_rows("weight", *weight, dy, rows, wide_type(dy));
    if (totals) check_of_rows("totals", *totals, dy, dy.size(0), wide_type(dy));
    if (x) {
      check_matrix_of_rows("x", *x);
      STD_TORCH_CHECK(x->scalar_type() == dy.scalar_type() && x->size(0) == rows && x->size(1) == dy.size(1) &&
                          x->is_cuda() == dy.is_cuda() && x->get_device_index() == dy.get_device_index(),
                      "x must be like dy, with as many rows as dest");
    }
    return rows;
  }

  GatheredRows(const Tensor& dy, int64_t rows, bool dots_)
      : dx(new_tensor(dy, {rows, dy.size(1)})), dots(new_tensor(dy, {dots_ ? rows : 0}, wide_type(dy))) {}
};

}  // namespace tokenops
