"""Triton kernels, one module per op under the op's own name (`grouped_conv`, `batch_norm`, ...).

Installs as `gconv.kernels`. Importing the package needs no Triton and no GPU: each module imports
Triton itself.
"""
