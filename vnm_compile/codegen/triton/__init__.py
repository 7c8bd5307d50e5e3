"""Sparse kernels in Triton for GPUs: templates, their lowering and their choices."""
