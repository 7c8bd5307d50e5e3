"""What is known of one kernel: its source, what the compiler makes of it, what it moves and computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from vnm_compile.codegen.generate import GeneratedKernel
from vnm_compile.hardware import Target, allows_tf32
from vnm_compile.inspection.account import Account, account_of
from vnm_compile.inspection.assembly import Instructions
from vnm_compile.inspection.machine_code import MachineCode

TOKENS = sympy.Symbol("T", positive=True)


class Kernel:
    """One generated kernel.

    Attributes:
        name: as the generated code calls it.
        language: "triton" or "cpp".
        source: the complete file that Inductor wrote.
        fused_ops: the ops that it computes, in graph order.
        template: the template it was made from, or None for Inductor's own pointwise and reduction kernels.
        launches: how often one call of the model launches it.
        graph: which of the model's graphs it belongs to.
        code: what the compiler makes of it; None for C++.
    """

    def __init__(self, generated: GeneratedKernel, graph: int, code: MachineCode | None, target: Target | None) -> None:
        self.graph = graph
        self.name, self.language, self.source = generated.name, generated.language, generated.source
        self.fused_ops, self.template = generated.schedule.fused_ops, generated.schedule.template
        self.launches, self.schedule = generated.launches, generated.schedule
        self.code, self._target = code, target

    @property
    def config(self) -> dict[str, Any]:
        """Block sizes, warps and stages."""
        return dict(self.code.config) if self.code else {}

    @property
    def ptx(self) -> str | None:
        """PTX; None for AMD and C++."""
        return self.code.intermediate if self.code and self._is("cuda") else None

    @property
    def amdgcn(self) -> str | None:
        """AMD assembly; None for NVIDIA and C++."""
        return self.code.intermediate if self.code and self._is("hip") else None

    @property
    def sass(self) -> str | None:
        """NVIDIA machine code, disassembled; None for AMD and C++."""
        return self.code.assembly if self.code and self._is("cuda") else None

    @property
    def binary(self) -> bytes | None:
        """cubin or hsaco; None for C++."""
        return self.code.binary if self.code else None

    @property
    def registers(self) -> int | None:
        """32-bit registers of a thread."""
        return self.code.registers if self.code else None

    @property
    def spills(self) -> int | None:
        """Bytes of a thread's registers that go to memory and back."""
        return self.code.spills if self.code else None

    @property
    def shared_bytes(self) -> int | None:
        """Shared memory of a block."""
        return self.code.shared_bytes if self.code else None

    @property
    def instructions(self) -> Instructions | None:
        """Instructions of the whole kernel."""
        return self.code.instructions if self.code else None

    @property
    def loop(self) -> Instructions | None:
        """Instructions of its hot loop."""
        return self.code.loop if self.code else None

    @property
    def bytes_moved(self) -> sympy.Expr:
        """Bytes read and written, each once; in T, the tokens, where the kernel multiplies by a sparse weight."""
        moved = (*self.schedule.reads, *self.schedule.writes)
        fixed = sum(each.nbytes for each in moved if not each.activation)
        return fixed + self._per_token(sum(each.nbytes for each in moved if each.activation))

    @property
    def flops(self) -> sympy.Expr:
        """Floating-point operations of its matrix products, as carried out; in T as `bytes_moved`."""
        return self._per_token(self.schedule.flops)

    @cached_property
    def account(self) -> Account | None:
        """Instructions by pipe, traffic, and which of them bounds it; None but for kernels of our GPU templates."""
        if self.code is None or self._target is None or "R" not in self.config:
            return None
        moved = round(self.at_tokens(self.bytes_moved))
        return account_of(self.schedule, self.code, moved, self._target)

    @property
    def peak_flops(self) -> float | None:
        """The target's flop/s for its products: of sparse tensor cores, where it multiplies on them, zeros counted."""
        if self._target is None:
            return None
        if self.schedule.sparse_cores:
            return self._target.sparse_flops or self._target.half_flops
        return self._target.peak_flops(self.schedule.dtype or torch.float32, allows_tf32())

    @property
    def roofline_seconds(self) -> float | None:
        """The least time a launch can take on the target: its bytes at full bandwidth, or its flops at full rate."""
        rate = self.peak_flops
        if self._target is None or rate is None:
            return None
        moved, flops = self.at_tokens(self.bytes_moved), self.at_tokens(self.flops)
        return max(moved / self._target.bandwidth, flops / rate)

    def at_tokens(self, of: sympy.Expr) -> float:
        """Bytes or flops of a launch, which are said in T, for the tokens that it was generated for."""
        return float(sympy.sympify(of).subs(TOKENS, self.schedule.tokens or 1))

    def to_dict(self) -> dict[str, Any]:
        """Its figures as JSON takes them: expressions in T, the tokens, as text, `bytes` for those it was made for."""
        result: dict[str, Any] = {
            "name": self.name,
            "language": self.language,
            "template": self.template,
            "fused_ops": list(self.fused_ops),
            "launches": self.launches,
            "graph": self.graph,
            "config": {key: str(value) for key, value in self.config.items()},
            "bytes_moved": str(sympy.sympify(self.bytes_moved)),
            "flops": str(sympy.sympify(self.flops)),
            "tokens": self.schedule.tokens,
            "bytes": round(self.at_tokens(self.bytes_moved)),
            "peak_flops": self.peak_flops,
            "roofline_seconds": self.roofline_seconds,
            "registers": self.registers,
            "spills": self.spills,
            "shared_bytes": self.shared_bytes,
        }
        for part, counted in (("instructions", self.instructions), ("hot_loop", self.loop)):
            if counted is not None:
                result[part] = {"total": counted.total, "tensor_core": counted.tensor_core}
                result[part] |= {"sparse": counted.sparse, "loads": counted.loads, "names": counted.names}
        result["account"] = self.account.to_dict() if self.account else None
        return result

    def _per_token(self, total: int) -> sympy.Expr:
        tokens = self.schedule.tokens
        return sympy.Rational(total, tokens) * TOKENS if tokens else sympy.Integer(total)

    def _is(self, backend: str) -> bool:
        return self._target is not None and self._target.backend == backend


@dataclass(frozen=True)
class LibraryCall:
    """A kernel that Inductor did not generate, such as attention or a dense matrix product: name, ops, flops."""

    name: str
    fused_ops: tuple[str, ...]
    flops: int
