"""What a pruning method is: its options, and how it makes a model's weights follow the pattern."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from vnm_compile.layers import Layer
from vnm_compile.prune.pruned import Pruned
from vnm_compile.prune.resume import PrunedLayers
from vnm_compile.spec import Spec

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Job:
    """What `vnm.sparsify` gives a method.

    Attributes:
        model: as it is before pruning, its channels permuted if that was asked for.
        selected: the layers to prune, and the pattern of each.
        batches: calibration data, checked; none may be there for a method that needs none.
        finished: where pruned layers are stored, and those of an interrupted run lie; None without a checkpoint.
        bar: for tasks that show how far it is.
        undo: gets callbacks that bring the model back; they are called if anything fails until the weights are written.
    """

    model: nn.Module
    selected: Sequence[tuple[Layer, Spec]]
    batches: Sequence[Any]
    finished: PrunedLayers | None
    bar: Progress
    undo: ExitStack


class Method(ABC):
    """A way to prune, with its options: subclasses are frozen dataclasses, whose fields are the options.

    Attributes:
        name: by which `vnm.sparsify` knows it with its default options.
        summary: what it does, in one line.
        needs_calibration: whether it looks at inputs of layers, or gradients.
        resumable: whether it stores layers in `Job.finished` one by one, and takes them up again.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_calibration: ClassVar[bool] = True
    resumable: ClassVar[bool] = False

    @abstractmethod
    def prune(self, job: Job) -> list[Pruned]:
        """Return what the layers of the job become, in any order.

        The layers hold their dense weights at the end as they did before; what else of the model was changed, such as
        by retraining, has its way back in `job.undo`.

        Raises:
            VNMError: data that does not reach a layer, is not finite or no input of the model.
        """

    def options(self) -> dict[str, Any]:
        """The options by name, those that were not given among them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@contextmanager
def undone_on_error() -> Iterator[ExitStack]:
    """Yield a stack of callbacks that are called, the last one first, if what is done inside fails."""
    undo = ExitStack()
    try:
        yield undo
    except BaseException:
        undo.close()
        raise
    undo.pop_all()  # with all that the callbacks hold
