"""Run the code that Inductor wrote for a GPU on the CPU: the whole wrapper, its kernels in Triton's interpreter.

The interpreter has to be on when Triton is imported, so it lives in a process of its own.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tests.codegen.triton.wrapper import call_wrapper


class Interpreter:
    """A process that interprets; `run` may be called any number of times."""

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        finally:
            os.environ.pop("TRITON_INTERPRET")
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before

    def run(self, wrapper: str, inputs: list[Any]) -> list[torch.Tensor]:
        """Outputs of a wrapper module for CPU inputs. New buffers are full of NaN, so what is read unwritten shows."""
        return self._ask("_call", wrapper, inputs)

    def first_tile(
        self, name: str, source: str, x: torch.Tensor, packed: Any, tokens: int, out_features: int
    ) -> list[torch.Tensor]:
        """What the first program of a kernel computes for many more tokens than there is memory: of `x [some, K]`."""
        return self._ask("_first_tile", name, source, x, tuple(packed), tokens, out_features)

    def _ask(self, function: str, *args: Any) -> list[torch.Tensor]:
        self._pipe.send_bytes(_pack((function, args)))
        result = _unpack(self._pipe.recv_bytes())
        if isinstance(result, str):
            raise AssertionError(result)
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(pipe: Any) -> None:
    import traceback

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _teach_the_interpreter()
        _Kernels.folder = Path(folder)
        while True:
            try:
                function, args = _unpack(pipe.recv_bytes())
            except EOFError:
                return
            try:
                with torch.no_grad():
                    result: Any = list(globals()[function](*args))
            except Exception:
                result = traceback.format_exc()
            pipe.send_bytes(_pack(result))


def _call(wrapper: str, inputs: list[Any]) -> Any:
    return call_wrapper(wrapper, inputs, _Kernels)


def _first_tile(
    name: str, source: str, x: torch.Tensor, packed: tuple[torch.Tensor, ...], tokens: int, out_features: int
) -> list[torch.Tensor]:
    # Memory that nobody touches is not there.
    some, width = x.shape
    whole = torch.empty_strided((tokens, width), (1, tokens), dtype=x.dtype)
    whole[:some] = x
    result = torch.empty(tokens, out_features, dtype=x.dtype)
    _Kernels().triton(name, source).function[(1, 1, 1)](whole, *packed, result)
    return [result[:some].clone()]


class _Kernels:
    """Stands for Inductor's AsyncCompile: kernels are loaded for the interpreter."""

    folder: Path
    count = 0

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Any:
        _Kernels.count += 1
        path = self.folder / f"kernel_{_Kernels.count}.py"
        text = source.replace("triton_helpers, triton_heuristics", "triton_helpers")
        path.write_text(f"from {__name__} import heuristics as triton_heuristics\n{text}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return getattr(module, name)

    def wait(self, names: dict[str, Any]) -> None:
        pass


class _Heuristics:
    """Stands for Inductor's triton_heuristics: its decorators keep what they are told."""

    def __getattr__(self, kind: str) -> Any:
        def decorate(**meta: Any) -> Any:
            return lambda function: _Kernel(kind, function, meta)

        return decorate


heuristics = _Heuristics()

_BLOCKS = {"XBLOCK": 64, "YBLOCK": 32, "ZBLOCK": 1, "R0_BLOCK": 64}


class _Kernel:
    """A kernel as the wrapper launches it."""

    def __init__(self, kind: str, function: Any, meta: dict[str, Any]) -> None:
        self.kind, self.function, self.meta = kind, function, meta

    def run(self, *args: Any, stream: Any) -> None:
        if self.kind == "template":
            *args, x, y, z = args  # type: ignore[assignment]
            self.function[(x, y, z)](*args)
            return
        signature = self.meta["triton_meta"]["signature"]
        blocks = {name: _BLOCKS[name] for name in signature if name in _BLOCKS}
        given = [name for name in signature if name not in blocks]
        sizes = dict(zip(given, args, strict=True))
        grid = []
        for axis in "xyz":
            block = blocks.get(f"{axis.upper()}BLOCK", 1)
            grid.append(-(-int(sizes.get(f"{axis}numel", 1)) // block))
        self.function[tuple(grid)](**sizes, **blocks)


def _teach_the_interpreter() -> None:
    """What Triton's interpreter cannot do: dot products in bf16, rounding to it, PTX, and the device library."""
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter

    import vnm_compile.ops  # noqa: F401  (wrappers call the reference where no kernel fits)
    from tests.codegen.triton import libdevice, ptx

    torch.cuda._DeviceGuard = lambda index: nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.set_device = lambda index: None  # type: ignore[assignment]
    triton_helpers.set_driver_to_gpu = lambda: None
    triton_helpers.libdevice = libdevice
    tensors = interpreter._patch_lang_tensor

    def patch_tensors(tensor: Any, scope: Any) -> None:
        """Triton before 3.7 makes an int of an array of one element, which NumPy from 2.4 on does not."""
        tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensors
    # Everything is on the CPU: nothing is copied back.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def cast_impl(self: Any, value: Any, kind: Any) -> Any:
        """To bf16 the interpreter cuts off bits; GPUs round to the nearest."""
        if value.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, value, kind)
        rounded = torch.from_numpy(value.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _as_float(a), _as_float(b), *rest)

    def _as_float(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: list[Any], types: Any, is_pure: bool, pack: int
    ) -> Any:
        assert pack == 1
        results = ptx.execute(asm, constraints, [value.data for value in values])
        handles = [interpreter.TensorHandle(each, tl.int32) for each in results]

        class Result:
            def get_result(self, i: int) -> Any:
                return handles[i]

        return Result()

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
