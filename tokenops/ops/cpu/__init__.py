"""Compositions of torch's own CPU kernels, where an operator is matrix products."""
