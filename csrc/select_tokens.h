// What the CPU's and the GPU's select_tokens share: the checks and the tensors that come out.
#pragma once

#include "companions.h"

#include <algorithm>
#include <optional>
#include <string>

namespace tokenops {

inline Rest rest_named(const std::string& name) {
  if (name == "none") return Rest::None;
  if (name == "weighted") return Rest::Weighted;
  if (name == "normalized") return Rest::Normalized;
  STD_TORCH_CHECK(name == "mean", "rest must be none, weighted, normalized or mean");
  return Rest::Mean;
}

inline void check_scores(const Tensor& scores, const Tensor& x, int64_t N) {
  check_matrix("scores", scores, x, N);
  check_float("scores", scores);
}

// (B,), or none
inline const int64_t* checked_counts(const std::optional<Tensor>& counts, const Tensor& like) {
  if (!counts) return nullptr;
  STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == like.size(0) && counts->is_contiguous() &&
                      counts->scalar_type() == ScalarType::Long && counts->is_cuda() == like.is_cuda() &&
                      counts->get_device_index() == like.get_device_index(),
                  "counts must be (B,), int64, contiguous");
  return static_cast<const int64_t*>(counts->data_ptr());
}

// Like the results of the schema, in its order. `fused`: of a normalized rest the sum of the weights and the token
// before it was rounded, (B,1+C), which its gradient needs.
struct Selected {
  Tensor tokens, index, normed, statistics, fused;
  std::vector<Tensor> companions;

  Selected(const Tensor& x, const Tensor& scores, int64_t k, int64_t prefix, Rest rest, bool norm,
           const std::vector<Tensor>& followers)
      : Selected(x, shape(x, k, prefix, rest), k, rest, norm) {
    check_scores(scores, x, x.size(1) - prefix);
    check_companions("companions", followers, x, x.size(1) - prefix);
    for (const Tensor& c : followers) companions.push_back(new_tensor(c, {x.size(0), k}));
  }

  auto tuple() { return std::make_tuple(tokens, index, normed, statistics, fused, companions); }

 private:
  static std::vector<int64_t> shape(const Tensor& x, int64_t k, int64_t prefix, Rest rest) {
    STD_TORCH_CHECK(x.dim() == 3, "x must have 3 dimensions");
    STD_TORCH_CHECK(prefix >= 0 && prefix <= x.size(1), "prefix must be between 0 and the number of rows");
    STD_TORCH_CHECK(k >= 0 && k <= x.size(1) - prefix, "k must be between 0 and the number of tokens");
    return {x.size(0), prefix + k + (rest != Rest::None), x.size(2)};
  }

  Selected(const Tensor& x, const std::vector<int64_t>& shape, int64_t k, Rest rest, bool norm)
      : tokens(new_tensor(x, shape)),
        index(new_tensor(x, {x.size(0), k}, ScalarType::Long)),
        normed(new_tensor(x, norm ? shape : std::vector<int64_t>{0})),
        statistics(new_tensor(
            x, norm ? std::vector<int64_t>{2, shape[0], shape[1]} : std::vector<int64_t>{0}, wide_type(x))),
        fused(new_tensor(
            x, rest == Rest::Normalized ? std::vector<int64_t>{shape[0], 1 + shape[2]} : std::vector<int64_t>{0},
            wide_type(x))) {}
};

using SelectedTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

// dx, dscores (of a weighted rest) and the companions' gradients
struct SelectedGradients {
  Tensor dx, dscores;
  std::vector<Tensor> dcompanions;

  SelectedGradients(const Tensor& dtokens, const std::vector<Tensor>& given, const Tensor& index, const Tensor& scores,
                    const std::optional<Tensor>& x, const std::optional<Tensor>& fused, int64_t prefix, Rest rest)
      : dx(new_tensor(checked(dtokens, scores),
                                   {scores.size(0), std::max<int64_t>(prefix, 0) + scores.size(1), dtokens.size(2)})),
        dscores(new_tensor(
            scores, weighted(rest) ? std::vector<int64_t>{scores.size(0), scores.size(1)} : std::vector<int64_t>{0})) {
    const int64_t N = scores.size(1);
    check_index("index", index, dtokens);
    check_scores(scores, dtokens, N);
    STD_TORCH_CHECK(prefix >= 0 && dtokens.size(1) == prefix + index.size(1) + (rest != Rest::None),
                    "dtokens must have the prefix, k rows and the rest");
    check_companions("dcompanions", given, dtokens, index.size(1));
    if (weighted(rest)) {
      STD_TORCH_CHECK(x.has_value(), "x must be given");
      check_rows("x", *x, dtokens);
      STD_TORCH_CHECK(x->size(1) == prefix + N, "x must have the prefix and N rows");
    }
    if (rest == Rest::Normalized) {
      STD_TORCH_CHECK(fused && fused->dim() == 2 && fused->size(0) == dtokens.size(0) && fused->is_contiguous() &&
                          fused->size(1) == 1 + dtokens.size(2) && fused->scalar_type() == wide_type(dtokens) &&
                          fused->is_cuda() == dtokens.is_cuda(),
                      "fused must be (B, 1 + C), contiguous, in the accumulation dtype");
    }
    for (const Tensor& d : given) dcompanions.push_back(new_tensor(d, {scores.size(0), N}));
  }

  static const Tensor& checked(const Tensor& dtokens, const Tensor& scores) {
    STD_TORCH_CHECK(dtokens.dim() == 3 && scores.dim() == 2, "dtokens and scores must have 3 and 2 dimensions");
    return dtokens;
  }
  static bool weighted(Rest rest) { return rest == Rest::Weighted || rest == Rest::Normalized; }
  auto tuple() { return std::make_tuple(dx, dscores, dcompanions); }
};

}  // namespace tokenops
