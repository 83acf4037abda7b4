"""Triton kernels and their launchers, one file an operator."""
