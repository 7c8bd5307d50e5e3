"""Files that were changed on their way: each is refused in one sentence before anything is built of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vnm_compile as vnm
from tests.support import make_sparse_

Tensors = dict[str, Tensor]
Header = dict[str, str]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return make_sparse_(nn.Sequential(nn.Linear(44, 70), nn.Linear(70, 40)), "16:2:8", seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    made = model()
    vnm.compress_model(made)
    return vnm.save(made, folder, max_shard_size="2.5KB")


def whole(folder: Path) -> tuple[Tensors, Header]:
    """The tensors of all shards, and what their headers say, taken together."""
    tensors: Tensors = {}
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        with safe_open(path, "pt") as file:
            weights |= json.loads((file.metadata() or {}).get("vnm_weights", "{}"))
    return tensors, {"format": "pt", "vnm_format": "1", "vnm_weights": json.dumps(weights)}


def listed(change: Callable[[dict], object]) -> Callable[[Tensors, Header], None]:
    def spoil(_: Tensors, header: Header) -> None:
        weights = json.loads(header["vnm_weights"])
        changed = change(weights)
        header["vnm_weights"] = changed if isinstance(changed, str) else json.dumps(weights)

    return spoil


def array(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors, Header], None]:
    def spoil(tensors: Tensors, _: Header) -> None:
        key = f"0.weight.vnm_{name}" if name else "0.weight"
        changed = change(tensors[key])
        tensors[key] = tensors[key] if changed is None else changed.contiguous()

    return spoil


def says(text: object) -> Callable[[Tensors, Header], None]:
    return listed(lambda weights: weights.update({"0.weight": text}))


def _swapped_columns(columns: Tensor) -> None:
    columns[0, 0] = columns[0, 0].flip(0)


def _equal_columns(columns: Tensor) -> None:
    columns[1, 2, 1] = columns[1, 2, 0]


def _far_column(columns: Tensor) -> None:
    columns[0, 0, 3] = 8


def _swapped_indices(metadata: Tensor) -> None:
    metadata[3, 0] = 0b0001_0001


def _equal_indices(metadata: Tensor) -> None:
    metadata[5, 1] = 0


def _rows_past_the_end(values: Tensor) -> None:
    values[79, 0] = 1.0


def _tail(values: Tensor) -> None:
    values[:70, -2:] = 1.0  # the tail has 4 real columns of 8, and offsets point past them


def _column_past_the_end(columns: Tensor) -> None:
    columns[:, -1] = torch.tensor([4, 5, 6, 7])


CHANGES: dict[str, tuple[Callable[[Tensors, Header], object], str]] = {
    "version 2": (lambda t, h: h.update(vnm_format="2"), "version '2'; this vnm_compile reads 1"),
    "version 0": (lambda t, h: h.update(vnm_format="0"), "version '0'"),
    "no version": (lambda t, h: h.pop("vnm_format"), "version None"),
    "version text": (lambda t, h: h.update(vnm_format="one" * 1000), "version"),
    "no list": (lambda t, h: h.pop("vnm_weights"), "the list of its compressed weights"),
    "no header": (lambda t, h: h.clear(), "that no header lists"),
    "list no JSON": (listed(lambda w: "{"), "cannot be read"),
    "list an array": (listed(lambda w: "[]"), "no JSON object"),
    "list nested": (listed(lambda w: "[" * 100_000), "cannot be read"),
    "not listed": (listed(lambda w: w.pop("0.weight") and None), "0.weight that no header lists"),
    "listed and not there": (listed(lambda w: w.update({"9.weight": "16:2:8 8x8"})), "9.weight.vnm_values is missing"),
    "layout a number": (says(5), "stored as 5"),
    "layout null": (says(None), "stored as None"),
    "layout a list": (says(["16:2:8 70x44"]), "stored as"),
    "layout empty": (says(""), "is no (layout|way)"),
    "layout without size": (says("16:2:8"), "is no (layout|way)"),
    "layout negative": (says("16:2:8 -70x44"), "is no (layout|way)"),
    "layout huge": (says("16:2:8 " + "9" * 150 + "x44"), "expected"),
    "layout long": (says("16:2:8 " + "9" * 5000 + "x44"), "is said to be stored as"),
    "layout unknown": (says("16:2:8 70x44 int8"), "is no (layout|way)"),
    "spec N": (says("16:3:8 70x44"), "n=3"),
    "spec zero": (says("0:2:8 70x44"), "v=0"),
    "spec other N": (says("16:1:8 70x44"), "vnm_values is float32"),
    "spec other M": (says("16:2:4 70x44"), "vnm_values is float32"),
    "spec other V": (says("8:2:8 70x44"), "vnm_values is float32 .80, 12., expected float32 .72, 12."),
    "spec same sizes": (says("16:2:9 70x50"), "0.weight: .* holds 16:2:9 70x50, the model's weight is .70, 44."),
    "rows": (says("16:2:8 75x44"), "holds 16:2:8 75x44"),
    "transposed": (says("16:2:8 70x44 transposed"), "holds 16:2:8 70x44 transposed"),
    "no empty tensor": (lambda t, h: t.pop("0.weight"), "0.weight is missing"),
    "dense tensor": (array("", lambda t: torch.zeros(70, 44)), "0.weight is float32 .70, 44., expected float32 .0."),
    "empty of another dtype": (array("", lambda t: t.half()), "0.weight is float16"),
    "no values": (lambda t, h: t.pop("0.weight.vnm_values"), "vnm_values is missing"),
    "no metadata": (lambda t, h: t.pop("0.weight.vnm_metadata"), "vnm_metadata is missing"),
    "no columns": (lambda t, h: t.pop("0.weight.vnm_columns"), "vnm_columns is missing"),
    "further array": (lambda t, h: t.update({"0.weight.vnm_scales": torch.ones(80)}), "vnm_scales is no array"),
    "array of nothing": (lambda t, h: t.update({"0.bias.vnm_values": torch.ones(80)}), "0.bias that no header lists"),
    "further weight": (lambda t, h: t.update({"7.bias": torch.ones(80)}), "no place for: 7.bias"),
    "missing weight": (lambda t, h: t.pop("1.bias"), "1.bias missing"),
    "values of integers": (array("values", lambda t: t.int()), "vnm_values is stored as I32"),
    "values of bytes": (array("values", lambda t: t.to(torch.uint8)), "expected uint8 .0."),
    "values short": (array("values", lambda t: t[:-1]), "vnm_values is float32 .79, 12."),
    "values wide": (array("values", lambda t: t.repeat(1, 2)), "vnm_values is float32 .80, 24."),
    "values flat": (array("values", lambda t: t.flatten()), "vnm_values is float32 .960."),
    "metadata of integers": (array("metadata", lambda t: t.int()), "vnm_metadata is I32"),
    "metadata short": (array("metadata", lambda t: t[:, :-1]), "vnm_metadata is uint8"),
    "columns wide": (array("columns", lambda t: t.to(torch.uint16)), "vnm_columns is uint16"),
    "columns of 3": (array("columns", lambda t: t[..., :3]), "vnm_columns is uint8"),
    "columns swapped": (array("columns", _swapped_columns), "column offsets of a block are not increasing"),
    "columns equal": (array("columns", _equal_columns), "column offsets of a block are not increasing"),
    "columns out of range": (array("columns", _far_column), "beyond the 8 columns"),
    "indices swapped": (array("metadata", _swapped_indices), "indices of a group in its metadata"),
    "indices equal": (array("metadata", _equal_indices), "indices of a group in its metadata"),
    "rows past the end": (array("values", _rows_past_the_end), "rows past the 70"),
    "columns past the end": (
        lambda t, h: (array("columns", _column_past_the_end)(t, h), array("values", _tail)(t, h)),
        "columns past the 44",
    ),
    "bias of another shape": (lambda t, h: t.update({"0.bias": torch.ones(71)}), "0.bias: .* holds .71."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_and_headers(saved, tmp_path, change):
    spoil, message = CHANGES[change]
    tensors, header = whole(saved)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    spoil(tensors, header)
    save_file(tensors, tmp_path / "model.safetensors", metadata=header)
    made = model(1)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(vnm.VNMError, match=message) as caught:
        vnm.load(tmp_path, made)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        changed = change(index)
        path.write_text(json.dumps(index) if not isinstance(changed, str) else changed)

    return spoil


def _first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: _first(folder).write_bytes(change(_first(folder).read_bytes()))


def _twice(folder: Path) -> None:
    """The second file holds a tensor of the first, too, and the index says so of both by turns."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    with safe_open(second, "pt") as file:
        header = file.metadata()
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata=header)


def _other_list(folder: Path) -> None:
    """Two files that list a weight as stored in two ways."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    with safe_open(first, "pt") as file:
        header = file.metadata()
    header["vnm_weights"] = header["vnm_weights"].replace("70x44", "71x44")
    save_file(load_file(second), second, metadata=header)


def _to(name: str) -> Callable[[Path], None]:
    return _index(lambda index: index["weight_map"].update({"0.bias": name}))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (_rewrite(lambda data: b""), "cannot be read as safetensors"),
    "cut in the header": (_rewrite(lambda data: data[:20]), "cannot be read as safetensors"),
    "cut in the data": (_rewrite(lambda data: data[:-8]), "cannot be read as safetensors"),
    "longer": (_rewrite(lambda data: data + bytes(8)), "cannot be read as safetensors"),
    "huge header": (_rewrite(lambda data: b"\xff" * 8 + data[8:]), "cannot be read as safetensors"),
    "pickle": (_rewrite(lambda data: b"\x80\x04K\x01."), "cannot be read as safetensors"),
    "offsets": (_rewrite(lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)), "safetensors"),
    "file missing": (lambda folder: _first(folder).unlink(), "which is missing"),
    "in both files": (_twice, "do not agree on whether it holds 0."),
    "listed in two ways": (_other_list, "and in another file as"),
    "index no JSON": (_index(lambda index: "{"), "cannot be read as JSON"),
    "index a list": (_index(lambda index: "[]"), "expected a JSON object"),
    "index empty": (_index(lambda index: "{}"), "has no weight_map"),
    "index without a tensor": (_index(lambda index: index["weight_map"].pop("0.weight") and None), "do not agree"),
    "index with one more": (_index(lambda i: i["weight_map"].update(more=min(i["weight_map"].values()))), "agree"),
    "absolute path": (_to("/etc/passwd"), "only read from the model's directory"),
    "path upwards": (_to("../model-00001-of-00002.safetensors"), "only read from the model's directory"),
    "path with backslash": (_to("..\\model.safetensors"), "only read from the model's directory"),
    "the directory itself": (_to("."), "only read from the model's directory"),
    "no file": (_to(""), "only read from the model's directory"),
    "null byte": (_to("model\0.safetensors"), "only read from the model's directory"),
    "a number": (_index(lambda i: i["weight_map"].update({"0.bias": 5})), "names the file 5, which is missing"),
    "no weights": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds neither model.safetensors"),
}


@pytest.mark.parametrize("change", FILES)
def test_changed_files(saved, tmp_path, change):
    spoil, message = FILES[change]
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vnm.load(tmp_path, model(1))
    spoil(tmp_path)
    made = model(1)
    with pytest.raises(vnm.VNMError, match=message):
        vnm.load(tmp_path, made)
    assert all(torch.equal(tensor, model(1).state_dict()[name]) for name, tensor in made.state_dict().items())


def test_no_directory(tmp_path):
    with pytest.raises(vnm.VNMError, match="is no file or directory"):
        vnm.load(tmp_path / "none", model())


def test_every_flipped_byte_is_refused_or_read_as_it_is(saved, tmp_path):
    """No change of one byte of the structure makes anything but an error, or a weight that follows the pattern."""
    tensors, header = whole(saved)
    save_file(tensors, tmp_path / "model.safetensors", metadata=header)
    data = (tmp_path / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(data), (300,), generator=generator).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "model.safetensors").write_bytes(changed)
        made = model(1)
        try:
            vnm.load(tmp_path, made)
        except vnm.VNMError:
            refused += 1
        else:
            assert vnm.matches(made[0].weight.to_dense(), "16:2:8")
    assert refused > 20
