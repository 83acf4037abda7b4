// What the operators' C++ shares. Only libtorch's stable ABI is included: one library serves every torch from 2.11 on.
//
// Users meet the checks in Python, which speak in words; those here are the second wall.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "shared.h"

namespace tokenops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous tensor, not filled, of the dtype of another. (torch::stable::new_empty looks its operator up by name.)
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                         std::optional<ScalarType> type) {
  int32_t dtype, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, &made));
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> type = std::nullopt) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t strides[8], stride = 1;
  STD_TORCH_CHECK(dims <= 8, "at most 8 dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) strides[d] = stride, stride *= sizes[d] > 1 ? sizes[d] : 1;
  return new_tensor(like, sizes.data(), strides, dims, type);
}

// (B, N, C) of any strides
inline Strided strided(const Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * bytes, x.stride(1) * bytes, x.stride(2) * bytes};
}

// Itself where its last dimension lies side by side in memory, else a copy
inline Tensor dense(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.stride(last) == 1 || x.size(last) == 1 || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

inline void check_rows(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must have 3 dimensions");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the other tensors' dtype");
  STD_TORCH_CHECK(x.get_device_index() == like.get_device_index() && x.is_cuda() == like.is_cuda(), name,
                  " must be on the other tensors' device");
  STD_TORCH_CHECK(x.size(0) == like.size(0) && x.size(2) == like.size(2), name,
                  " must have as many images and channels as the others");
}

inline void check_index(const char* name, const Tensor& index, const Tensor& like) {
  STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == like.size(0), name, " must be (B, k)");
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Long, name, " must be int64");
  STD_TORCH_CHECK(index.get_device_index() == like.get_device_index() && index.is_cuda() == like.is_cuda(), name,
                  " must be on the other tensors' device");
}

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_float(const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Double,
                  name, " must be of a float dtype");
}

// A layer norm's weight or bias
inline void check_channels(const char* name, const Tensor& t, const Tensor& x) {
  check_float(name, t);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(x.dim() - 1) && t.is_cuda() == x.is_cuda() &&
                      t.get_device_index() == x.get_device_index(),
                  name, " must be (C,), on the other tensors' device");
}
// The same in the accumulation dtype, without gaps
inline const void* checked_channels(const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t) return nullptr;
  check_channels(name, *t, x);
  STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == wide_type(x), name,
                  " must be contiguous, in the accumulation dtype");
  return t->data_ptr();
}

// tokens has `carried` rows for the prefix ahead of its k others
inline void check_carried(int64_t carried, int64_t prefix, int64_t rows) {
  STD_TORCH_CHECK(prefix >= 0 && prefix <= rows, "prefix must be between 0 and the number of rows");
  STD_TORCH_CHECK(carried == 0 || carried == prefix, "tokens must have k rows, or the prefix and k rows");
}

}  // namespace tokenops
