"""Which part of a multiprocessor executes an instruction of machine code, and how many of each it takes in a cycle.

Rates are those of the CUDA C++ Programming Guide, "Arithmetic Instructions", for compute capabilities 8 and 9; later
ones are counted like them. AMD's are those of the ISA guides of CDNA 3 and RDNA 3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from vnm_compile.hardware import Target
from vnm_compile.inspection.limits import TENSOR

ISSUE = "issue"

# Warp instructions that a multiprocessor starts in a cycle, by pipe: four schedulers, 64 lanes of integers, 128 of
# floats, 32 of loads and stores, 16 of the rest.
_RATES = {"integer": 2.0, "float": 4.0, "memory": 1.0, "special": 0.5}
_MNEMONICS = {
    "integer": "BMSK F2FP FMNMX FSEL FSETP IABS IADD IADD3 IADD64 IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P SEL "
    "SGXT SHF SHL SHR VIADD VIADDMNMX VIMNMX",
    "float": "FADD FCHK FFMA FFMA2 FMUL HADD2 HFMA2 HMUL2 IDP IMAD",
    "memory": "ATOM ATOMG ATOMS LDC LDG LDGDEPBAR LDGSTS LDL LDS LDSM LDT LDTM RED SHFL STG STL STS STSM STT STTM "
    "UBLKCP UTCCP UTMALDG UTMASTG",
    "special": "BREV F2F F2I FLO I2F I2FP MUFU POPC",
}
_PIPES = {mnemonic: pipe for pipe, mnemonics in _MNEMONICS.items() for mnemonic in mnemonics.split()}
_ISSUED = 4.0
_TENSOR_CORE = re.compile(r"[HIBDQO]G?MMA|UTC\w*MMA")
_MULTIPLY = re.compile(r"[HIBDQO](G?)MMA\.(?:SP\.)?(?:(\d+)x(\d+)x(\d+)|(\d{4,5}))")
_AMD_MULTIPLY = re.compile(r"v_s?(?:mfma|mfmac|wmma)\w*?_(\d+)x(\d+)x(\d+)")
_AMD = (
    ("tensor", ("v_mfma", "v_smfma", "v_wmma")),
    ("memory", ("global_", "buffer_", "flat_", "ds_", "scratch_")),
    ("vector", ("v_",)),
    ("scalar", ("s_",)),
)


def pipes_of(names: Mapping[str, int], nvidia: bool) -> dict[str, int]:
    """Instructions by the pipe that executes them.

    Args:
        names: how often each occurs, with its modifiers.
        nvidia: SASS; else amdgcn.
    """
    counted: Counter[str] = Counter()
    for name, times in names.items():
        counted[_pipe(name) if nvidia else _amd_pipe(name)] += times
    return dict(counted.most_common())


def _pipe(name: str) -> str:
    if _TENSOR_CORE.match(name):
        return TENSOR
    mnemonic = name.split(".")[0]
    if mnemonic in _PIPES:
        return _PIPES[mnemonic]
    return "uniform" if mnemonic.startswith(("U", "R2U", "S2U")) else "control"


def _amd_pipe(name: str) -> str:
    return next((pipe for pipe, starts in _AMD if name.startswith(starts)), "control")


def instruction_seconds(pipes: Mapping[str, int], steps: int, target: Target) -> dict[str, float]:
    """The least seconds that `steps` steps of a warp take the device: to issue, and in each pipe but the tensor cores',
    whose time their arithmetic says."""
    a_second = target.multiprocessors * target.clock
    if target.backend == "cuda":
        rates = {ISSUE: _ISSUED, **_RATES}
        counts = {ISSUE: sum(pipes.values()), **pipes}
    else:
        # On CDNA four SIMDs take four cycles for a wave of 64, on RDNA each of a WGP's four takes one for 32 lanes.
        rates = dict.fromkeys(("vector", "scalar"), 1.0 if target.warp_size == 64 else 4.0)
        counts = dict(pipes)
    return {pipe: steps * counts[pipe] / (rate * a_second) for pipe, rate in rates.items() if counts.get(pipe)}


def products_of(names: Mapping[str, int]) -> float:
    """Multiplications and additions, each counted, of a warp in these tensor-core instructions; 0 where their names do
    not say (sm_100), or where there are none."""
    return sum(times * _products(name) for name, times in names.items())


def _products(name: str) -> float:
    found = _AMD_MULTIPLY.match(name)
    if found:
        m, n, k = map(int, found.groups())
        return 2.0 * m * n * k
    found = _MULTIPLY.match(name)
    if not found:
        return 0.0
    group, *sizes, packed = found.groups()
    if packed:  # 16816: 16 x 8 x 16
        return 2.0 * 16 * 8 * int(packed[3:] if packed.startswith("168") else packed[2:])
    m, n, k = map(int, sizes)
    return 2.0 * m * n * k / (4 if group else 1)  # four warps multiply together


_ENCODED = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
_UPPER = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")


def stall_cycles(encoded: Iterable[str]) -> int:
    """Cycles that the compiler lets a warp wait after each of these instructions, added up.

    Args:
        encoded: lines of nvdisasm with the encoding beside the instructions (`-hex`). From Volta on an instruction has
            two words of 64 bits, and the upper one's bits 41 to 44 are that number (arXiv 1804.06826, section 2.1).
    """
    total, expected = 0, False
    for line in encoded:
        if expected and (upper := _UPPER.match(line)):
            total += int(upper[1], 16) >> 41 & 15
        expected = _ENCODED.search(line) is not None
    return total
