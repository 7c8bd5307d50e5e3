"""What kernels want packed arrays to be like: the owner of everything that is made of canonical arrays.

Checkpoints and compressed weights hold the canonical arrays (`vnm_compile.format`). A kernel may want them otherwise:
rows at whole loads, in the order of a tensor core's fragments. That is its `Prepack`, which lies beside the lowering of
its device; whoever hands arrays to a kernel asks it, and nobody else knows.
"""

from __future__ import annotations

from vnm_compile.format import Packed


class Prepack:
    """Kernels that read the canonical arrays as they are, wherever they lie."""

    canonical = True
    """Whether any canonical arrays will do. Arrays that somebody else holds are then handed to kernels as they are."""

    def prepare(self, packed: Packed) -> Packed:
        """Return canonical arrays as the kernels want them; themselves, where they are so already."""
        return packed

    def renew(self, kept: Packed, fresh: Packed) -> Packed:
        """Return what takes the place of prepared arrays when their weight has changed, given those of what it holds
        now. New ones: another thread may be reading the old."""
        return fresh
