// What launching shares: the device, the stream, tensors as the kernels take them, and an exception where a launch
// failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <climits>
#include <optional>
#include <stdexcept>
#include <string>

#include "../companions.h"
#include "companions.cuh"
#include "rows.cuh"

// Weak, so that the same library loads where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace tokenops {

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// Makes x's device the current one and finds its stream. Our CUDA runtime is linked statically, so it is told as well.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;

  OnDevice(const char* op, const Tensor& x) : guard(x.get_device_index()) {
    const int device = x.get_device_index();
    check_cuda(op, cudaSetDevice(device));
    check_cuda(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

inline Float float_of(const Tensor& t) {
  const auto type = t.scalar_type();
  if (type == ScalarType::Float) return Float::F32;
  if (type == ScalarType::BFloat16) return Float::BF16;
  if (type == ScalarType::Half) return Float::F16;
  STD_TORCH_CHECK(type == ScalarType::Double, "float16, bfloat16, float32 and float64 are allowed");
  return Float::F64;
}

inline Companion companion(const Tensor& t) {
  const Matrix matrix(t);
  return {matrix.data, matrix.stride_b, matrix.stride_n};
}

// (B, tokens)
inline Values values(const std::optional<Tensor>& t) {
  if (!t || t->numel() == 0) return {};
  return {static_cast<char*>(t->data_ptr()), float_of(*t), t->stride(0), t->stride(1)};
}

// Of tensors like x; what comes out is empty unless it is wanted
inline Norm norm_of(bool wanted, const Tensor& x, const Tensor& normed, const Tensor& statistics,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  Norm norm{};
  norm.wanted = wanted, norm.eps = eps;
  norm.weight = checked_channels("weight", weight, x), norm.bias = checked_channels("bias", bias, x);
  if (wanted) {
    const int64_t half = statistics.numel() / 2 * static_cast<int64_t>(statistics.element_size());
    norm.normed = static_cast<char*>(normed.data_ptr());
    norm.means = statistics.data_ptr(), norm.deviations = static_cast<char*>(norm.means) + half;
  }
  return norm;
}

// Whether there is something to launch
inline bool checked(const Plan& chosen) {
  STD_TORCH_CHECK(chosen.width > 0, "the data is not aligned to its elements");
  STD_TORCH_CHECK(chosen.blocks <= INT_MAX, "too many images for one launch");
  return chosen.blocks != 0;
}

// Calls f with a value of the type of `like`.
template <typename F>
void launch(const char* op, const Plan& chosen, const Tensor& like, const F& f) {
  if (!checked(chosen)) return;
  switch (float_of(like)) {
    case Float::F32: f(float{}); break;
    case Float::BF16: f(BFloat16{}); break;
    case Float::F16: f(Half{}); break;
    case Float::F64: f(double{}); break;
  }
  check_cuda(op, cudaGetLastError());
}

}  // namespace tokenops
