"""All mutants."""

from mutants import cpu_kernels, cuda_kernels, triton_kernels

MUTANTS = [*cuda_kernels.MUTANTS, *cpu_kernels.MUTANTS, *triton_kernels.MUTANTS]
