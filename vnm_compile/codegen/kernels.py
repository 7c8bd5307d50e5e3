"""The kernels of each type of device: how the `vnm` ops are lowered there, and what packed arrays have to be like.

A new type of device is a folder with a lowering and, where its kernels want other than the canonical arrays, a prepack;
and an entry here.
"""

from vnm_compile.codegen.cpp import lowering as cpp
from vnm_compile.codegen.inductor import Kernels, register_kernels
from vnm_compile.codegen.triton import lowering as triton
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.prepack import Prepack

register_kernels("cpu", Kernels(cpp.linear, cpp.gated_linear, cpp.lacking, Prepack()))
register_kernels("cuda", Kernels(triton.linear, triton.gated_linear, triton.lacking, AlignedRows()))
