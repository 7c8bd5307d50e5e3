"""The GPUs that code can be generated for without having one: what their compilers need to know, and how fast they are.

One representative card stands for each architecture. Limits are those of NVIDIA's compute-capability tables (CUDA
C++ Programming Guide, "Technical Specifications per Compute Capability") and of AMD's ISA and tuning guides; rates are
from the vendors' data sheets, dense (without structured sparsity) and with fp32 accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vnm_compile.errors import VNMError


@dataclass(frozen=True)
class Target:
    """A GPU architecture and the card that stands for it.

    Attributes:
        name: `sm_90`, `gfx942`: what the user writes.
        card: the card.
        arch: what Triton calls it: 90, or "gfx942".
        warp_size: threads that run in lockstep.
        multiprocessors: SMs, CUs or WGPs, as torch counts them.
        threads: most threads on one multiprocessor at a time.
        shared_bytes: most shared memory of a block (with opt-in).
        l2_bytes: size of the last-level cache on the chip.
        bandwidth: of its memory, bytes/s.
        half_flops, tf32_flops, fp32_flops: peak of fp16 and bf16 on tensor cores, of tf32 on tensor cores, and of
            fp32, flop/s.
        registers: 32-bit registers of a multiprocessor.
    """

    name: str
    card: str
    arch: int | str
    warp_size: int
    multiprocessors: int
    threads: int
    shared_bytes: int
    l2_bytes: int
    bandwidth: float
    half_flops: float
    tf32_flops: float
    fp32_flops: float
    registers: int = 65536

    @property
    def backend(self) -> str:
        """Triton's backend: "cuda" or "hip"."""
        return "cuda" if isinstance(self.arch, int) else "hip"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as torch reports it; on AMD the first two digits of the architecture, likewise."""
        if isinstance(self.arch, int):
            return divmod(self.arch, 10)
        digits = self.arch.removeprefix("gfx")
        return int(digits[:-2]), int(digits[-2], 16)

    def peak_flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Peak flop/s of a matrix product in `dtype`; fp32 goes to tensor cores only where tf32 is allowed."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half_flops
        return self.tf32_flops if tf32 else self.fp32_flops


_KB, _MB = 1 << 10, 1 << 20

TARGETS = {
    target.name: target
    for target in (
        # NVIDIA A100 80GB SXM data sheet.
        Target("sm_80", "A100 SXM", 80, 32, 108, 2048, 163 * _KB, 40 * _MB, 2.039e12, 312e12, 156e12, 19.5e12),
        # NVIDIA GA102 whitepaper, GeForce RTX 3090.
        Target("sm_86", "RTX 3090", 86, 32, 82, 1536, 99 * _KB, 6 * _MB, 0.936e12, 71e12, 35.6e12, 35.6e12),
        # NVIDIA Ada whitepaper, GeForce RTX 4090.
        Target("sm_89", "RTX 4090", 89, 32, 128, 1536, 99 * _KB, 72 * _MB, 1.008e12, 165.2e12, 82.6e12, 82.6e12),
        # NVIDIA H200 SXM data sheet.
        Target("sm_90", "H200 SXM", 90, 32, 132, 2048, 227 * _KB, 50 * _MB, 4.8e12, 989e12, 494e12, 67e12),
        # NVIDIA HGX B200 data sheet, an eighth of the board.
        Target("sm_100", "B200", 100, 32, 148, 2048, 227 * _KB, 126 * _MB, 7.7e12, 2250e12, 1125e12, 75e12),
        # NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090.
        Target("sm_120", "RTX 5090", 120, 32, 170, 1536, 99 * _KB, 96 * _MB, 1.792e12, 209.5e12, 104.8e12, 104.8e12),
        # AMD Instinct MI300X data sheet (L2: the infinity cache).
        Target("gfx942", "MI300X", "gfx942", 64, 304, 2048, 64 * _KB, 256 * _MB, 5.3e12, 1307e12, 654e12, 163e12),
        # AMD Radeon RX 7900 XTX product page; torch counts its 96 CUs as 48 WGPs.
        Target("gfx1100", "RX 7900 XTX", "gfx1100", 32, 48, 2048, 64 * _KB, 96 * _MB, 0.96e12, 123e12, 61e12, 61e12),
    )
}


def find_target(name: str | Target) -> Target:
    """Return the target called `name`.

    Raises:
        VNMError: there is no such target.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise VNMError(f"target {name!r} is unknown; code can be generated for {', '.join(TARGETS)}.")
    return TARGETS[name]


def allows_tf32() -> bool:
    """Whether the user lets fp32 matrix products run in TF32, by whichever of torch's settings: `allow_tf32`,
    `fp32_precision` (torch.backends, .cuda or .cuda.matmul) or `torch.set_float32_matmul_precision`.

    Reading `allow_tf32` raises once `fp32_precision` was set; the latter answers for all of them.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
