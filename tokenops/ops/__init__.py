"""The operators, one a file, and what they share; their public names are those of `tokenops`.

An operator's file has its docstring, its checks and its autograd function. `reference` says what is right, `schemas`
what torch is told of every kernel, `backends` which of them runs; kernels are in `triton`, `cpu` and compiled code.
"""
