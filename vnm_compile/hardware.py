"""What machines can do: the one table of devices, for the kernels' static model, for limits and for reports.

Limits of a GPU are those of NVIDIA's compute-capability tables (CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability") and of AMD's ISA and tuning guides. Rates and bandwidths are from the vendors' data sheets, the
source named at each card: dense (without structured sparsity), accumulated in fp32, at the clock beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vnm_compile.errors import BadOption

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A GPU: what the compilers that generate code for it need to know, and how fast it is.

    Attributes:
        name: of its architecture, `sm_90` or `gfx942`: what the user writes.
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
        clock: of its multiprocessors at those peaks, 1/s.
        cache_bytes: that a multiprocessor reads from L2 in a cycle when all of them do.
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
    clock: float
    cache_bytes: float
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

    @property
    def sparse_flops(self) -> float:
        """Peak of fp16 and bf16 on sparse tensor cores, zeros counted, flop/s: twice the dense one where a warp's
        products (mma.sp) reach it, as the sources of Ampere, Ada and consumer Blackwell have it; else 0."""
        return 2 * self.half_flops if self.backend == "cuda" and self.capability[0] in (8, 12) else 0.0

    def peak_flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Peak flop/s of a matrix product in `dtype`; fp32 goes to tensor cores only where tf32 is allowed."""
        if dtype in _HALF:
            return self.half_flops
        return self.tf32_flops if tf32 else self.fp32_flops


@dataclass(frozen=True)
class Core:
    """One core of a CPU, as fast as it is where all of them work: `half_flops` is of bf16 dot products."""

    bandwidth: float
    half_flops: float
    fp32_flops: float

    def peak_flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Peak flop/s of a matrix product in `dtype`; a CPU has no tf32."""
        return self.half_flops if dtype.itemsize <= 2 else self.fp32_flops


_KB, _MB = 1 << 10, 1 << 20

_A100 = Target(
    "sm_80", "A100-SXM4-80GB", 80, 32, 108, 2048, 163 * _KB, 40 * _MB, 2.039e12, 312e12, 156e12, 19.5e12, 1.41e9, 35
)
_AMPERE = Target(
    "sm_86", "RTX 3090", 86, 32, 82, 1536, 99 * _KB, 6 * _MB, 0.936e12, 71e12, 35.6e12, 35.6e12, 1.695e9, 15
)
_ADA = Target(
    "sm_89", "RTX 4090", 89, 32, 128, 1536, 99 * _KB, 72 * _MB, 1.008e12, 165.2e12, 82.6e12, 82.6e12, 2.52e9, 15
)
_H200 = Target("sm_90", "H200", 90, 32, 132, 2048, 227 * _KB, 50 * _MB, 4.8e12, 989e12, 494e12, 67e12, 1.83e9, 36)
_B200 = Target("sm_100", "B200", 100, 32, 148, 2048, 227 * _KB, 126 * _MB, 7.7e12, 2250e12, 1125e12, 75e12, 1.86e9, 36)
_RTX_5090 = Target(
    "sm_120", "RTX 5090", 120, 32, 170, 1536, 99 * _KB, 96 * _MB, 1.792e12, 209.5e12, 104.8e12, 104.8e12, 2.41e9, 15
)
_MI300X = Target(
    "gfx942", "MI300X", "gfx942", 64, 304, 2048, 64 * _KB, 256 * _MB, 5.3e12, 1307e12, 654e12, 163e12, 2.1e9, 48
)
_RX_7900 = Target(
    "gfx1100", "RX 7900 XTX", "gfx1100", 32, 48, 2048, 64 * _KB, 96 * _MB, 0.96e12, 123e12, 61e12, 61e12, 2.5e9, 48
)

CARDS = (
    _A100,  # NVIDIA A100 data sheet
    replace(_A100, card="A100 80GB PCIe", bandwidth=1.935e12),  # same
    replace(_A100, card="A100-SXM4-40GB", bandwidth=1.555e12),  # same, of the 40 GB cards
    replace(_A100, card="A100-PCIE-40GB", bandwidth=1.555e12),  # same
    _AMPERE,  # NVIDIA GA102 whitepaper
    _ADA,  # NVIDIA Ada whitepaper
    replace(  # NVIDIA L4 data sheet
        _ADA,
        card="L4",
        multiprocessors=58,
        l2_bytes=48 * _MB,
        bandwidth=0.3e12,
        half_flops=121e12,
        tf32_flops=60e12,
        fp32_flops=30.3e12,
        clock=2.04e9,
    ),
    replace(  # NVIDIA L40S data sheet
        _ADA,
        card="L40S",
        multiprocessors=142,
        l2_bytes=96 * _MB,
        bandwidth=0.864e12,
        half_flops=362e12,
        tf32_flops=183e12,
        fp32_flops=91.6e12,
    ),
    _H200,  # NVIDIA H200 data sheet, SXM
    replace(_H200, card="H100", bandwidth=3.35e12),  # NVIDIA H100 data sheet, SXM
    replace(  # NVIDIA H100 whitepaper, PCIe
        _H200,
        card="H100 PCIe",
        multiprocessors=114,
        bandwidth=2.0e12,
        half_flops=756e12,
        tf32_flops=378e12,
        fp32_flops=51e12,
        clock=1.62e9,
    ),
    replace(  # NVIDIA H100 data sheet, NVL
        _H200,
        card="H100 NVL",
        bandwidth=3.9e12,
        half_flops=835e12,
        tf32_flops=417e12,
        fp32_flops=60e12,
        clock=1.54e9,
    ),
    replace(  # NVIDIA H200 data sheet, NVL
        _H200, card="H200 NVL", half_flops=835e12, tf32_flops=417e12, fp32_flops=60e12, clock=1.54e9
    ),
    replace(_H200, card="GH200 480GB", bandwidth=4.0e12),  # NVIDIA GH200 data sheet, 96 GB of HBM3
    _B200,  # NVIDIA HGX B200 data sheet, an eighth of the board
    _RTX_5090,  # NVIDIA RTX Blackwell whitepaper
    _MI300X,  # AMD Instinct MI300X data sheet (L2: the infinity cache)
    replace(_MI300X, card="MI325X", bandwidth=6.0e12),  # AMD Instinct MI325X data sheet
    _RX_7900,  # AMD Radeon RX 7900 XTX product page; torch counts its 96 CUs as 48 WGPs
)
"""The cards that are known; the first of an architecture stands for it. A card is told by its name within torch's."""

TARGETS: dict[str, Target] = {}
for _card in CARDS:
    TARGETS.setdefault(_card.name, _card)

CPU_CORE = Core(bandwidth=20e9, half_flops=500e9, fp32_flops=250e9)
"""A core of a server, of any: 2 units of 16 fused multiply-adds (AVX-512) at 3.9 GHz, bf16 dot products twice that, and
20 GB/s, a core's share of eight to twelve channels of DDR5."""


def find_target(name: str | Target) -> Target:
    """Return the target called `name`.

    Raises:
        VNMError: there is no such target.
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise BadOption(f"target {name!r} is unknown; code can be generated for {', '.join(TARGETS)}.")
    return TARGETS[name]


def target_of(properties: Any) -> Target:
    """The GPU that has these properties (of `torch.cuda.get_device_properties`).

    Its limits are its own. Its rates are those of the card of its name; where that is not in the table, those of the
    card that stands for its architecture, or for the closest one of the same make, times its share of multiprocessors.
    """
    hip = bool(torch.version.hip)
    arch = properties.gcnArchName.split(":")[0] if hip else 10 * properties.major + properties.minor
    name = arch if hip else f"sm_{arch}"
    card = _card_called(properties.name, name) or _card_like(name, (properties.major, properties.minor), hip)
    share = properties.multi_processor_count / card.multiprocessors
    return replace(
        card,
        name=name,
        card=properties.name,
        arch=arch,
        warp_size=properties.warp_size,
        multiprocessors=properties.multi_processor_count,
        threads=properties.max_threads_per_multi_processor,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", card.shared_bytes),
        l2_bytes=properties.L2_cache_size,
        half_flops=share * card.half_flops,
        tf32_flops=share * card.tf32_flops,
        fp32_flops=share * card.fp32_flops,
    )


def machine_of(device: torch.device | str) -> Target | Core:
    """The GPU at a device, or a core of the CPU. The H200 stands for a device that is no GPU of this machine."""
    device = torch.device(device)
    if device.type == "cpu":
        return CPU_CORE
    if device.type == "cuda" and torch.cuda.is_available():
        return target_of(torch.cuda.get_device_properties(device))
    return TARGETS["sm_90"]


def allows_tf32() -> bool:
    """Whether the user lets fp32 matrix products run in TF32, by whichever of torch's settings: `allow_tf32`,
    `fp32_precision` (torch.backends, .cuda or .cuda.matmul) or `torch.set_float32_matmul_precision`.

    Reading `allow_tf32` raises once `fp32_precision` was set; the latter answers for all of them.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _card_called(full_name: str, architecture: str) -> Target | None:
    """The card with the longest name that is part of `full_name`, as "H100 PCIe" is of "NVIDIA H100 PCIe"."""
    words = f" {full_name} "
    named = [each for each in CARDS if each.name == architecture and f" {each.card} " in words]
    return max(named, key=lambda each: len(each.card), default=None)


def _card_like(architecture: str, capability: tuple[int, int], hip: bool) -> Target:
    alike = [each for each in TARGETS.values() if (each.backend == "hip") == hip]
    below = [each for each in alike if each.capability <= capability] or alike
    return TARGETS.get(architecture) or max(below, key=lambda each: each.capability)
