"""The evidence run: everything worth knowing of the kernels on a GPU, in minutes. benchmarks/GPU.md says how."""
