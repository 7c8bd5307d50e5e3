"""Compile a generated Triton kernel for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from vnm_compile.hardware import Target
from vnm_compile.inspection.assembly import Instructions, count_instructions

_PASSED_ON = ("enable_fp_fusion",)
"""What Inductor hands from a kernel's file to the compiler, besides warps and stages."""

_ENCODING = re.compile(r"\s*/\* 0x[0-9a-f]{16} \*/$")


@dataclass(frozen=True)
class MachineCode:
    """What the compiler makes of a kernel.

    Attributes:
        ttir: Triton's own code, before it knows of threads; of Gluon's kernels, which say where threads are, with them.
        intermediate: PTX for NVIDIA, amdgcn assembly for AMD.
        assembly: SASS for NVIDIA, amdgcn assembly for AMD.
        encoded: SASS with every instruction's encoding beside it, which holds what the compiler tells the schedulers;
            None for AMD.
        binary: cubin or hsaco.
        registers: 32-bit registers of a thread.
        spills: bytes of a thread's registers that go to memory and back.
        shared_bytes: shared memory (LDS) of a block.
        config: block sizes, warps and stages that it was compiled with.
    """

    ttir: str
    intermediate: str
    assembly: str
    encoded: str | None
    binary: bytes
    registers: int
    spills: int
    shared_bytes: int
    config: Mapping[str, Any]

    @cached_property
    def instructions(self) -> Instructions:
        """Of the whole kernel."""
        return count_instructions(self.assembly)

    @cached_property
    def loop(self) -> Instructions:
        """Of its hot loop; none where there is no loop."""
        return count_instructions(self.assembly, loop_only=True)


def compile_kernel(source: str, name: str, target: Target) -> MachineCode:
    """Compile the kernel `name` of a file that Inductor wrote, with the first of its configurations.

    Args:
        source: the complete file.
        name: of the kernel.
        target: what to compile for. Code for a virtual device is compiled inside `virtual_device`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with loaded(source) as module:
        kernel = getattr(module, name)
        meta, config = kernel.triton_meta, kernel.configs[0]
        constants = {**meta["constants"], **config.kwargs}
        signature = {key: "constexpr" if key in constants else kind for key, kind in meta["signature"].items()}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options |= {key: meta[key] for key in _PASSED_ON if key in meta}
        compiled = triton.compile(
            ASTSource(kernel.fn, signature, constants, meta["configs"][0]),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=options,
        )
    used = {**kernel.inductor_meta.get("config_args", {}), **config.kwargs}
    used |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        text, binary = compiled.asm["amdgcn"], compiled.asm["hsaco"]
        return MachineCode(
            compiled.asm["ttir"], text, text, None, binary, *_amd_resources(text, target.warp_size), shared, used
        )
    binary = compiled.asm["cubin"]
    encoded, usage = _disassemble(binary)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources of {name}: {usage}")
    asm = compiled.asm
    ttir = asm["ttir" if "ttir" in asm else "ttgir"]
    return MachineCode(
        ttir, asm["ptx"], _without_encoding(encoded), encoded, binary, int(found[1]), int(found[2]), shared, used
    )


@contextmanager
def loaded(source: str) -> Iterator[ModuleType]:
    """The module of a kernel's file, which Triton reads the kernel's source from as long as it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("vnm_inspected_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[module.__name__]


def _disassemble(binary: bytes) -> tuple[str, str]:
    """SASS of a cubin, with encodings, and the line of its resources, from the tools that Triton's wheel carries."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)

        def run(tool: Any, *options: str) -> str:
            command = [tool.path, *options, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return run(knobs.nvidia.nvdisasm, "-c", "-hex"), run(knobs.nvidia.cuobjdump, "--dump-resource-usage")


def _without_encoding(encoded: str) -> str:
    """What nvdisasm prints without `-hex`: an instruction's first word stands behind it, its second on its own line."""
    stripped = ((line, _ENCODING.sub("", line)) for line in encoded.split("\n"))
    return "\n".join(plain for line, plain in stripped if plain == line or plain.strip())


def _amd_resources(text: str, warp_size: int) -> tuple[int, int]:
    """Vector registers of a thread, and bytes of them that are spilled, from the kernel's metadata."""

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    # A scalar register is one for the whole wavefront.
    spilled = 4 * entry("vgpr_spill_count") + -(-4 * entry("sgpr_spill_count") // warp_size)
    return entry("vgpr_count"), spilled
