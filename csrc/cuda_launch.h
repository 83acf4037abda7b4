// What launching shares: the device, the stream, and an exception where a launch failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "companions.h"
#include "cuda/companions.cuh"
#include "cuda/numbers.cuh"

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

}  // namespace tokenops
