// What launching shares: the device, the stream, and an exception where a launch failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "companions.h"
#include "cuda/companions.cuh"

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

inline Companion companion(const Tensor& t) {
  const Matrix matrix(t);
  return {matrix.data, matrix.stride_b, matrix.stride_n};
}

}  // namespace tokenops
