"""Compressed models in transformers: importing this makes `from_pretrained` and `save_pretrained` know them.

    import vnm_compile.integrations.transformers
    model = AutoModel.from_pretrained(directory)  # compressed, as it was saved
    model = AutoModel.from_pretrained(pruned, quantization_config=VnmConfig())  # dense with zeros: compressed on load

transformers asks a quantizer of its registry for both. While the files are read, each compressed weight is a module of
its own that holds the arrays as parameters, so transformers reads, casts and places them as any others, and a dense
weight is never made. Afterwards the arrays, now checked, become the layer's weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from vnm_compile.annotate import ANY_SIZE, select_layers, set_annotation
from vnm_compile.checkpoint.files import open_checkpoint
from vnm_compile.checkpoint.flat import VERSION, StoredWeight, array_name, flatten, metadata
from vnm_compile.checks import check_usable, why_unusable
from vnm_compile.convert import compressed_layers, decompress_model
from vnm_compile.errors import BadFile, BadOption, UnsupportedWeight, VNMError, at_layer
from vnm_compile.format import detect
from vnm_compile.layers import Layer, linear_layers
from vnm_compile.memory import return_freed_memory
from vnm_compile.quantization import Quantization
from vnm_compile.quantizing.quantize import quantised_weight
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress

METHOD = "vnm"

_HOW = "import vnm_compile.integrations.transformers, then from_pretrained"


class VnmConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model, and how a dense one is compressed while it is loaded.

    Args:
        spec: the pattern that the selected layers of a dense checkpoint follow; None looks for one in each, and
            leaves layers without one dense. Of no account for checkpoints that are compressed.
        include, exclude: names or globs of layers, as for `vnm.annotate`.
        values, group: "int8" or "int4", to store what those layers keep as integers, rounded to the nearest; as for
            `vnm.quantize`, which rounds better where it has data. Of no account for checkpoints that are compressed.

    Raises:
        VNMError: the pattern cannot be read, there are no such values, or the checkpoint is of a later format.
    """

    def __init__(
        self,
        spec: str | Spec | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        values: str | None = None,
        group: int | str = 64,
        format_version: int = VERSION,
        **_: Any,
    ) -> None:
        if format_version != VERSION:
            raise BadFile(
                f"config.json says that the format of its compressed weights is version {format_version!r:.20}; this "
                f"vnm_compile reads {VERSION}. Update vnm_compile, or save the model again."
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.how_to_load = _HOW
        self.spec = None if spec is None else str(Spec.parse(spec))
        self.include = include
        self.exclude = exclude
        self.values = values
        self.group = None if values is None else group
        if values is not None:
            Quantization.of(values, group)

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class VnmQuantizer(HfQuantizer):
    """What transformers asks while it loads or saves a model with compressed weights."""

    requires_calibration = False
    quantization_config: VnmConfig

    def __init__(self, quantization_config: VnmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._on_the_fly: _OnTheFly | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what compressed weights cannot do: being offloaded."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise BadOption(
                "compressed weights cannot be offloaded: device_map puts a part of the model on the CPU or the disk. "
                "Give one that names GPUs only, or the CPU only."
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            self._on_the_fly = _OnTheFly(model, self.quantization_config)
            return
        if checkpoint_files is None or any(not str(file).endswith(".safetensors") for file in checkpoint_files):
            raise BadFile("a compressed model is read from safetensors files, and nothing else.")
        with open_checkpoint(checkpoint_files) as found:
            weights = dict(found.weights)
            _refuse_training_state(model, found.tensors)
        expect_arrays(model, weights)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self._on_the_fly is not None:
            self._on_the_fly.finish(model)
            self._on_the_fly = None
        else:
            take_arrays(model)
        _settle(model)
        return_freed_memory()

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a dense weight is looked at while it is loaded."""
        return self._on_the_fly is not None and self._on_the_fly.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to each of those."""
        assert self._on_the_fly is not None
        return self._on_the_fly

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The arrays by name, as `save_pretrained` writes them, and what the files' headers say of them."""
        tensors, weights = flatten(model.state_dict())
        return tensors, metadata(weights)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        decompress_model(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of compressed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """That is what they are for."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(VnmConfig)
    register_quantizer(METHOD)(VnmQuantizer)


def follow_weights(model: Any) -> None:
    """Give a model the quantizer where weights of it are compressed, and take ours away where none is."""
    compressed = bool(compressed_layers(model))
    quantizer = getattr(model, "hf_quantizer", None)
    if compressed and quantizer is None:
        model.hf_quantizer = VnmQuantizer(VnmConfig(), pre_quantized=True)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.quantization_method = METHOD
        _settle(model)
    elif not compressed and isinstance(quantizer, VnmQuantizer):
        quantizer.remove_quantization_config(model)


def _settle(model: Any) -> None:
    """Say of a model with the quantizer what sets it apart from quantised ones."""
    model.is_quantized = False  # or it refuses `.half()`, and Trainer to evaluate it: compressed weights can do both
    # Saved under the names that it has here, which the arrays are listed by: renaming would take arrays for weights.
    model._weight_conversions = []
    if not getattr(model, "_takes_arrays", False):
        model.register_load_state_dict_pre_hook(_gather_arrays)
        model._takes_arrays = True


def _gather_arrays(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Make weights of the arrays in a state dict that was read from files, as a Trainer does that goes on.

    Raises:
        VNMError: they are not those of the weight in their place.
    """
    for layer in compressed_layers(model):
        stored = StoredWeight.of(layer.stored)  # type: ignore[arg-type]
        name = f"{prefix}{layer.name}.weight"
        names = [array_name(name, array) for array in stored.layout.names]
        if all(each in state for each in names):
            state[name] = stored.weight([state.pop(each).clone() for each in names])


def _refuse_training_state(model: nn.Module, stored: Iterable[str]) -> None:
    names = set(stored)
    for layer in linear_layers(model):
        if {f"{layer.name}.values", f"{layer.name}.columns"} <= names:
            raise at_layer(
                layer.name,
                "the files were saved while the model trained on its compressed weights; call vnm.finalize(model) "
                "before it is saved.",
                BadFile,
            )


class _Arrays(nn.Module):
    """In the place of a compressed weight while its arrays are read: they are its parameters."""

    def __init__(self, weight: nn.Parameter, stored: StoredWeight) -> None:
        super().__init__()
        layout = stored.layout
        self.stored = stored
        self.following: list[str] = []  # the layer's parameters after the weight
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes(weight.dtype), strict=True):
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(f"vnm_{name}", nn.Parameter(empty, requires_grad=False))
        self._is_hf_initialized = True

    def weight(self) -> VNMTensor:
        """The weight that the arrays make up, checked. Those that kernels take offsets from are copied: as they were
        read, they may be the file's memory, and would change with it after they were checked."""
        values, *structure = (getattr(self, f"vnm_{name}").detach() for name in self.stored.layout.names)
        return self.stored.weight([values, *(array.clone() for array in structure)])


def expect_arrays(model: Any, weights: dict[str, StoredWeight]) -> None:
    """Make room in a model on the meta device for the arrays of these compressed weights.

    Raises:
        VNMError: a weight has another shape in the model, or cannot be compressed there.
    """
    layers = {layer.name: layer for layer in linear_layers(model)}
    tied = _tied(model)
    for name, stored in weights.items():
        layer = _layer(layers, name.removesuffix(".weight"), model.base_model_prefix)
        if layer is None:
            continue  # of a head that this class does not have: transformers lists it as unexpected
        weight = layer.module._parameters.get("weight")
        reason = why_unusable(layer, values=False)
        if f"{layer.name}.weight" in tied:
            reason = "it is compressed in the files, and tied to another weight in this model (tie_word_embeddings)."
        if reason is not None or weight is None:
            raise at_layer(layer.name, reason or "it has no weight.", UnsupportedWeight)
        if tuple(weight.shape) != stored.shape or layer.transposed != stored.transposed:
            raise at_layer(layer.name, f"the files hold {stored}, config.json says {list(weight.shape)}.", BadFile)
        arrays, parameters = _Arrays(weight, stored), layer.module._parameters
        arrays.following = list(parameters)[list(parameters).index("weight") + 1 :]
        del parameters["weight"]
        layer.module.add_module("weight", arrays)
        layer.module._is_hf_initialized = True  # type: ignore[assignment]
    # The empty tensors that stop readers who do not know the format.
    ignored = {rf"(^|\.){re.escape(name)}$" for name in weights}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored


def take_arrays(model: nn.Module) -> None:
    """Make compressed weights of the arrays that were read, checked.

    Raises:
        VNMError: arrays were not read, or hold what the format does not allow.
    """
    for layer in list(linear_layers(model)):
        arrays = layer.module._modules.get("weight")
        if not isinstance(arrays, _Arrays):
            continue
        if any(array.is_meta for array in arrays.parameters()):
            raise at_layer(layer.name, "its compressed weight was not read, or is offloaded.", BadFile)
        try:
            weight = arrays.weight()
        except VNMError as error:
            raise at_layer(layer.name, str(error), BadFile) from error
        del layer.module._modules["weight"]
        parameter = nn.Parameter(weight, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        layer.module.register_parameter("weight", parameter)
        for name in arrays.following:  # optimizers and their checkpoints know parameters by their order
            layer.module._parameters[name] = layer.module._parameters.pop(name)
        set_annotation(layer.module, arrays.stored.layout.spec, layer.name)


class _OnTheFly(ConversionOps):
    """Compresses dense weights one at a time, as they are read."""

    def __init__(self, model: Any, config: VnmConfig) -> None:
        selected = select_layers(model, config.spec or ANY_SIZE, config.include, config.exclude)
        tied = _tied(model)
        self._layers = {f"{layer.name}.weight": layer for layer, _ in selected if f"{layer.name}.weight" not in tied}
        check_usable(self._layers.values(), values=False)
        self._spec = None if config.spec is None else Spec.parse(config.spec)
        self._quantization = None if config.values is None else Quantization.of(config.values, config.group or 64)
        self._error: VNMError | None = None

    def __deepcopy__(self, memo: Any) -> _OnTheFly:
        return self

    def wants(self, name: str) -> bool:
        """Whether the weight of this name is to be looked at."""
        return name in self._layers

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weight compressed, or as it is where it follows no pattern."""
        found = next(iter(input_dict.values()))
        weight = found[0] if isinstance(found, list) else found
        layer = self._layers[full_layer_name]
        dense = weight.t() if layer.transposed else weight
        try:
            spec = self._spec or detect(dense)
            compressed = None if spec is None else self._compress(dense, spec, layer.name)
        except VNMError as error:  # transformers would only log it
            self._error = self._error or error
            compressed = None
        return_freed_memory()  # what packing needed meanwhile would pile up otherwise
        if compressed is None:
            return {full_layer_name: weight}
        stored = compressed.t() if layer.transposed else compressed
        return {full_layer_name: nn.Parameter(stored, requires_grad=False)}

    def _compress(self, dense: Tensor, spec: Spec, name: str) -> VNMTensor:
        weight = compress(dense, spec, name)
        if self._quantization is None:
            return weight
        if not bool(weight.values.isfinite().all()):
            raise at_layer(
                name, "its weight holds NaN or infinity, which integers cannot stand for.", UnsupportedWeight
            )
        return quantised_weight(weight.packed, weight.layout_of_arrays, self._quantization)

    def finish(self, model: nn.Module) -> None:
        """Note the patterns, now that all is read.

        Raises:
            VNMError: a weight broke the pattern that was asked for, or none follows one.
        """
        if self._error is not None:
            raise self._error
        for layer in compressed_layers(model):
            set_annotation(layer.module, layer.stored.spec, layer.name)  # type: ignore[union-attr]


def _tied(model: Any) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(tied) | set(tied.values())


def _layer(layers: dict[str, Layer], name: str, prefix: str) -> Layer | None:
    """The layer of this name, saved from this class or from the one with (or without) a head."""
    return layers.get(name) or layers.get(f"{prefix}.{name}") or layers.get(name.removeprefix(f"{prefix}."))
