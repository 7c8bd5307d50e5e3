"""Sparse kernels for GPUs, written in Triton."""
