"""Sparse kernels in C++ for CPUs: templates, their lowering and their choices."""
