// What the CPU's and the GPU's merge_neighbours share: the pairs of a grid, the checks and the tensors that come out.
#pragma once

#include "companions.h"

namespace tokenops {

// Two tokens that become one; b is -1 where a is alone.
struct Pair {
  int64_t a, b;
};

struct Grid {
  int64_t height, width;
  bool vertical;

  int64_t merged() const { return vertical ? (height + 1) / 2 * width : height * ((width + 1) / 2); }

  // those that become token t
  Pair pair(int64_t t) const {
    const int64_t columns = vertical ? width : (width + 1) / 2, row = t / columns, column = t % columns;
    if (vertical) return {2 * row * width + column, 2 * row + 1 < height ? (2 * row + 1) * width + column : -1};
    return {row * width + 2 * column, 2 * column + 1 < width ? row * width + 2 * column + 1 : -1};
  }
};

// (1,) or (C,)
inline void check_factors(const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && (t->size(0) == 1 || t->size(0) == x.size(2)), name, " must be (1,) or (C,)");
  STD_TORCH_CHECK(t->get_device_index() == x.get_device_index() && t->is_cuda() == x.is_cuda(), name,
                  " must be on the other tensors' device");
  check_float(name, *t);
}

// x is the tokens, or the gradient of the merged ones (`rows` of them behind the prefix)
inline void check_merge(const Tensor& x, const Grid& grid, int64_t rows, int64_t prefix,
                        const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                        const std::optional<Tensor>& logits, const std::optional<Tensor>& sizes) {
  STD_TORCH_CHECK(x.dim() == 3, "x must have 3 dimensions");
  STD_TORCH_CHECK(grid.height >= 0 && grid.width >= 0 && prefix >= 0, "sizes must be at least 0");
  STD_TORCH_CHECK(x.size(1) == prefix + rows, "x must have the prefix and the tokens of the grid");
  check_factors("first", first, x);
  check_factors("second", second, x);
  for (const auto& [name, t] : {std::pair("logits", &logits), {"sizes", &sizes}}) {
    if (!*t) continue;
    check_matrix(name, **t, x, grid.height * grid.width);
    check_float(name, **t);
  }
  STD_TORCH_CHECK(!logits || (!first && !second), "logits and factors exclude each other");
}

inline std::vector<int64_t> only_if(bool asked, std::vector<int64_t> shape) {
  return asked ? shape : std::vector<int64_t>{0};
}

// Like the results of the schema, in its order; to be made of what was checked.
struct Merged {
  Tensor y, sizes, normed, statistics;

  Merged(const Tensor& x, const std::optional<Tensor>& given, const Grid& grid, int64_t prefix, bool norm)
      : y(new_tensor(x, {x.size(0), prefix + grid.merged(), x.size(2)})),
        sizes(new_tensor(given ? *given : x, only_if(given.has_value(), {x.size(0), grid.merged()}))),
        normed(new_tensor(x, only_if(norm, {x.size(0), prefix + grid.merged(), x.size(2)}))),
        statistics(new_tensor(x, only_if(norm, {2, x.size(0), prefix + grid.merged()}), wide_type(x))) {}
};

struct MergedGradients {
  Tensor dx, dfirst, dsecond, dlogits;

  MergedGradients(const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& first,
                  const std::optional<Tensor>& second, const std::optional<Tensor>& logits, const Grid& grid,
                  int64_t prefix)
      : dx(new_tensor(dy, {dy.size(0), prefix + grid.height * grid.width, dy.size(2)})),
        dfirst(like(first, x, dy)),
        dsecond(like(second, x, dy)),
        dlogits(like(logits, x, dy)) {
    if (!x) return;
    check_rows("x", *x, dy);
    STD_TORCH_CHECK(x->size(1) == dx.size(1), "x must have the prefix and the tokens of the grid");
  }

 private:
  // of a tensor that is there and learns, which x tells
  static Tensor like(const std::optional<Tensor>& t, const std::optional<Tensor>& x, const Tensor& dy) {
    if (!x || !t) return new_tensor(dy, {0});
    if (t->dim() == 1) return new_tensor(*t, {t->size(0)});
    return new_tensor(*t, {t->size(0), t->size(1)});
  }
};

}  // namespace tokenops
