"""The functions of the device library that generated code calls, in what Triton's interpreter knows."""

import triton
import triton.language as tl


@triton.jit
def erf(x):
    return tl.math.erf(x)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def log1p(x):
    return tl.log(1.0 + x)
