"""A program from a seed: how many steps, of which kinds, under which settings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from tests.fuzz.program import Program, Settings
from tests.fuzz.steps import KINDS, SPECS, draw_step
from tests.fuzz.writes import COMPRESSED_WRITES, DENSE_WRITES

WIDTHS = (24, 32, 40)
_TOKENS = (1, 1, 2, 3, 5, 8, 17)


def generate(
    seed: int,
    kernels: float = 0.1,
    kinds: Sequence[str] | None = None,
    without: Sequence[str] = (),
    means: Sequence[str] = (),
    storage: str | None = None,
) -> Program:
    """The program of a seed.

    Args:
        kernels: share of the programs that go through Inductor and its C++ kernels; a quarter of the rest goes through
            AOTAutograd, and what is left runs the rewritten graph node by node, which costs least.
        kinds: draw steps of these kinds only.
        without: kinds and writes to leave out; "writes" for all writes.
        means: draw writes among these only.
        storage: of the weights, "dense" or "compressed"; drawn when None.
    """
    rng = random.Random(seed)
    width, spec = rng.choice(WIDTHS), rng.choice(SPECS)
    lot = rng.random()
    through = "inductor" if lot < kernels else "aot" if lot < kernels + 0.25 * (1 - kernels) else "fx"
    count = rng.randint(1, 2) if through == "inductor" else rng.randint(1, 5)
    names = [kind for kind in kinds or KINDS if kind not in without]
    steps = tuple(draw_step(rng, i, width, spec, names) for i in range(count))
    settings = _settings(rng, seed, width, through, storage)
    writes = tuple("none" if "writes" in without or each in without else each for each in settings.writes)
    if any(step.kind == "checkpointed" for step in steps):
        # Eager mode recomputes a block with the weights that the module has by then, a graph with those of its call.
        writes = tuple("none" if each == "functional" else each for each in writes)
    if means:
        settings = replace(settings, storage="dense")
        writes = tuple(rng.choice(list(means)) if i % 2 else "none" for i in range(len(writes)))
    return Program(steps, replace(settings, writes=writes))


def _settings(rng: random.Random, seed: int, width: int, through: str, storage: str | None) -> Settings:
    mode = rng.choices(("no_grad", "inference", "input_grad", "train"), (5, 1, 2, 1.5))[0]
    drawn = "compressed" if rng.random() < 0.25 else "dense"
    storage = storage or drawn
    batch = rng.choice((1, 2, 3))
    dynamic = rng.choice((None, None, True, True, False))
    few = dynamic is False or (dynamic is None and through == "inductor")
    sizes = [(batch, rng.choice(_TOKENS))]
    for _ in range(rng.randint(5, 9) if dynamic else rng.randint(2, 4)):
        if few and rng.random() < 0.75:
            sizes.append(sizes[0])
        else:
            sizes.append((rng.choice((batch, batch, 1, 4)), rng.choice((*_TOKENS, 0, 33))))
    means = COMPRESSED_WRITES if storage == "compressed" else DENSE_WRITES
    writes = [rng.choice(sorted(means)) if rng.random() < 0.6 else "none" for _ in sizes[1:]]
    if mode == "inference":
        writes = ["none" if rng.random() < 0.5 else write for write in writes]
    return Settings(
        seed=seed,
        width=width,
        dtype=rng.choices(("float32", "bfloat16", "float16"), (6, 3, 1))[0],
        mode=mode,
        autocast="bfloat16" if rng.random() < 0.12 else "none",
        dynamic=dynamic,
        storage=storage,
        annotated=rng.random() < 0.3,
        merge=rng.random() < 0.9,
        through=through,
        frozen=rng.random() < 0.5,
        flat=storage == "dense" and rng.random() < 0.12,
        input=rng.choices(("contiguous", "offset", "transposed", "expanded"), (5, 1, 1, 0.5))[0],
        calls=tuple(sizes),
        writes=tuple(writes),
    )
