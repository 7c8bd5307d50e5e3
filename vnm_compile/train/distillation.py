"""Distillation: a loss that draws a pruned model to the dense one it was made from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnm_compile._torch import tree_map_only
from vnm_compile.errors import BadLoss, BadModel, BadOption
from vnm_compile.layers import plain_name
from vnm_compile.names import some_of
from vnm_compile.prune.calibration.padding import real_positions
from vnm_compile.train.masked import masked_layers


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of a distillation loss; a term of weight 0 is not computed.

    Attributes:
        hidden: mean over layers of the squared difference of hidden states over the teacher's mean square, so that
            layers of large activations do not outweigh the others (TinyBERT, arXiv 1909.10351, normalised).
        embeddings: 1 - cosine of the sequences' embeddings.
        logits: KL divergence from the teacher's distribution to the student's, softened by `temperature` and scaled by
            its square (arXiv 1503.02531); AST (arXiv 2407.20584) trains sparse weights with it alone.
        task: the student's own loss, from its outputs (`labels` among the inputs).
        temperature: of the `logits` term, above 0.
    """

    hidden: float = 1.0
    embeddings: float = 1.0
    logits: float = 0.0
    task: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise BadOption(f"{each.name} is {value!r}; give a number that is not negative.")
        if self.temperature == 0:
            raise BadOption("temperature is 0; give a number above 0.")
        if not (self.hidden or self.embeddings or self.logits):
            raise BadOption("no term of the loss looks at the teacher; give hidden, embeddings or logits a weight.")


@dataclass
class Distilled:
    """What one call of a `Distillation` came to.

    Attributes:
        loss: the weighted sum, a scalar with gradients.
        terms: each term before it is weighted, without gradients.
        outputs: what the student returned.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    outputs: Any = field(repr=False)


class Distillation:
    """The loss between a student and its teacher: `distillation(student, **batch).loss.backward()`.

        teacher = copy.deepcopy(model)
        distillation = vnm.train.Distillation(teacher, vnm.train.Terms(hidden=1, embeddings=1))

    Both get the same arguments, the teacher under `no_grad` and in evaluation mode. Models of transformers are asked
    for their hidden states; of others, `layers` names the modules whose outputs are compared. Padding, by the keyword
    `attention_mask`, counts for nothing in any term. Differences are taken in fp32.
    """

    def __init__(
        self,
        teacher: nn.Module,
        terms: Terms | None = None,
        *,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        embed: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    ) -> None:
        """Make the loss.

        Args:
            teacher: the dense model, a copy of its own; it is put into evaluation mode and its parameters are frozen.
            terms: weights of the terms.
            layers: names of the modules whose outputs are the hidden states, or which of the teacher's (value) each of
                the student's (key) is compared with; by default what a model of transformers calls `hidden_states`.
            embed: of outputs and keyword arguments the embeddings `[batch, features]`; by default the mean of the last
                hidden state over tokens that are no padding, or the output itself where it is a matrix.

        Raises:
            VNMError: `layers` names no module of the teacher, or is empty, or is needed and was left out; or the
                teacher is a copy that was made after masks were put on, and is masked itself.
        """
        masked = masked_layers(teacher)
        if masked:
            raise BadModel(
                f"the teacher has masks itself ({some_of(layer.name for layer in masked)}) and would teach what they "
                "leave; copy the model before vnm.train.begin."
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.terms = Terms() if terms is None else terms
        named = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers or ()}
        if layers is not None and not named:
            raise BadOption("layers is empty; name modules, or leave it out for models of transformers.")
        for name in named.values():
            _module(teacher, name, "teacher")
        if self.terms.hidden and not named and not _tells_hidden_states(teacher):
            raise BadModel(
                f"{type(teacher).__name__} takes no output_hidden_states; name the modules to compare with layers=, or "
                "give Terms(hidden=0)."
            )
        self._layers, self._embed = named, embed

    def __call__(self, student: nn.Module, *args: Any, **kwargs: Any) -> Distilled:
        """Call both models and compare what they make of the arguments.

        Raises:
            VNMError: the models share parameters, or do not return what a term looks at.
        """
        _check_apart(student, self.teacher)
        if self.terms.hidden and not self._layers:
            kwargs = {"output_hidden_states": True, **kwargs}
        with torch.no_grad():
            # Of its own: a model may write to what it is called with, and the student is called with the same.
            own_args, own_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            theirs, their_states = self._run(self.teacher, list(self._layers.values()), own_args, own_kwargs)
        ours, our_states = self._run(student, list(self._layers), args, kwargs)
        mask = _positions(self.teacher, kwargs)
        compute = {
            "hidden": lambda: _hidden_difference(our_states, their_states, mask),
            "embeddings": lambda: _cosine_distance(self._embedding(ours, kwargs), self._embedding(theirs, kwargs)),
            "logits": lambda: _divergence(_logits(ours), _logits(theirs), self.terms.temperature, mask),
            "task": lambda: _own_loss(ours),
        }
        found = {name: make() for name, make in compute.items() if getattr(self.terms, name)}
        loss = torch.stack([getattr(self.terms, name) * term for name, term in found.items()]).sum()
        return Distilled(loss, {name: term.detach() for name, term in found.items()}, ours)

    def _embedding(self, outputs: Any, kwargs: dict[str, Any]) -> Tensor:
        if self._embed is not None:
            return self._embed(outputs, kwargs)
        return _mean_embedding(outputs, _positions(self.teacher, kwargs))

    def _run(
        self, model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """Outputs of a model, and its hidden states as far as a term asks for them."""
        if not self.terms.hidden:
            return model(*args, **kwargs), []
        if not names:
            outputs = model(*args, **kwargs)
            told = getattr(outputs, "hidden_states", None)
            if not told:
                raise BadModel(
                    f"{type(model).__name__} returns no hidden_states; name the modules to compare with layers=."
                )
            return outputs, list(told)
        states: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                state = output[0] if isinstance(output, tuple) else output
                if isinstance(state, Tensor):
                    states[name].append(state.clone())  # the model may go on writing to it

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.enter_context(_module(model, name, "student").register_forward_hook(keep(name)))
            outputs = model(*args, **kwargs)
        missing = [name for name, each in states.items() if not each]
        if missing:
            raise BadModel(f"{', '.join(missing)} returned no tensor on this call, so there is nothing to compare.")
        return outputs, [state for name in names for state in states[name]]


def _tells_hidden_states(model: nn.Module) -> bool:
    """Whether a model may be asked for its hidden states, as those of transformers are."""
    parameters = inspect.signature(model.forward).parameters
    return "output_hidden_states" in parameters or any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
    )


def _module(model: nn.Module, name: str, role: str) -> nn.Module:
    """A module by name, also of a model that DDP or torch.compile has wrapped, whole or in parts."""
    modules = {plain_name(each): module for each, module in model.named_modules(remove_duplicate=False)}
    for each in (name, f"module.{name}"):
        if each in modules:
            return modules[each]
    raise BadOption(f"layers names {name!r}, and the {role}, a {type(model).__name__}, has no such module.")


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    theirs = set(teacher.parameters())
    if any(parameter in theirs for parameter in student.parameters()):
        raise BadModel(
            "teacher and student share parameters, so the teacher would be pruned and trained along; give the teacher "
            "a copy of its own: Distillation(copy.deepcopy(model)), made before the masks are put on."
        )


def _positions(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which positions of the outputs are no padding, `[batch, tokens]`; None where no mask says so."""
    second = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = kwargs.get("decoder_attention_mask" if second else "attention_mask")
    return real_positions(mask) if isinstance(mask, Tensor) else None


def _tokens(mask: Tensor | None, like: Tensor) -> Tensor:
    """Which positions of `like`, `[batch, tokens, ...]`, count."""
    shape = like.shape[:-1]
    if mask is None or mask.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    return mask.to(like.device)


def _hidden_difference(ours: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
    if len(ours) != len(theirs):
        raise BadModel(
            f"the student has {len(ours)} hidden states and the teacher {len(theirs)}; say with layers= which belong "
            "together."
        )
    found = []
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise BadModel(f"a hidden state of the student is {tuple(one.shape)}, the teacher's {tuple(other.shape)}.")
        inside = _tokens(mask, other)
        expected = other[inside].float()
        found.append((one[inside].float() - expected).square().mean() / expected.square().mean().clamp_min(1e-12))
    return torch.stack(found).mean()


def _cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    if ours.shape != theirs.shape or ours.dim() < 2:
        raise BadModel(
            f"embeddings of the student are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}; give embed= a "
            "function that makes [batch, features] of the outputs."
        )
    return (1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1)).mean()


def _mean_embedding(outputs: Any, mask: Tensor | None) -> Tensor:
    states = getattr(outputs, "last_hidden_state", None)
    if states is None and getattr(outputs, "hidden_states", None):
        states = outputs.hidden_states[-1]
    if states is None and isinstance(outputs, Tensor):
        states = outputs
    if states is None:
        raise BadModel(
            f"a {type(outputs).__name__} has no last_hidden_state to make embeddings of; give embed= a function that "
            "does, or Terms(embeddings=0)."
        )
    if states.dim() < 3:
        return states
    inside = _tokens(mask, states).unsqueeze(-1)
    return (states.float() * inside).sum(1) / inside.sum(1).clamp_min(1)


def _logits(outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise BadModel(f"a {type(outputs).__name__} has no logits; give Terms(logits=0).")
    return logits


def _divergence(ours: Tensor, theirs: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    if ours.shape != theirs.shape:
        raise BadModel(f"logits of the student are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}.")
    inside = _tokens(mask, theirs)
    one, other = (F.log_softmax(each[inside].float() / temperature, -1) for each in (ours, theirs))
    each = F.kl_div(one, other, reduction="none", log_target=True).sum(-1)
    return temperature**2 * each.sum() / max(1, each.numel())


def _own_loss(outputs: Any) -> Tensor:
    loss = getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise BadLoss("the student returned no loss for Terms(task=...); give it labels, or add your own loss.")
    return loss.float()
