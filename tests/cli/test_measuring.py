"""`inspect`, `bench` and `report`: from a model directory, or a config alone."""

from __future__ import annotations

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, ViTConfig, Wav2Vec2Config

import vnm_compile as vnm
from tests.cli.test_prune_and_explain import one_line, run
from tests.support import CHROMIUM
from vnm_compile.cli.inputs import example_inputs
from vnm_compile.cli.models import sparse_model
from vnm_compile.comparison import compare_model
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.explanation.layer import LayerReport
from vnm_compile.report import Page


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "model"
    model = LlamaForCausalLM(llama(1)).eval()
    vnm.sparsify(model, "16:2:8", progress=False)
    vnm.compress_model(model)
    return vnm.save(model, folder)


def llama(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    made = llama(7)
    made.dtype = torch.bfloat16
    made.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_bench(compressed):
    report = json.loads(run("bench", compressed, "--length", 8, "--seconds", 0.1, "--json"))
    assert set(report["seconds"]) == {"eager", "torch.compile", "vnm"}
    assert report["ratio"] > 0
    assert report["rounds"] >= 7
    assert report["difference"] < 1e-5
    assert report["explanation"]["totals"]["sparse"] == 7
    assert report["device"]


@pytest.mark.slow
def test_bench_a_config_alone(config):
    given = (config / "config.json", "--blocks", 1, "--spec", "16:2:8", "--length", 8)
    shown = run("bench", *given, "--seconds", 0.1, "--policy", "memory")
    assert "7 of 8 linears run sparse" in one_line(shown)
    assert "outputs differ by" in one_line(shown)


def test_compare_model():
    """What `bench` does, without a command line around it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    vnm.sparsify(model, "16:2:8", progress=False)
    vnm.compress_model(model)
    found = compare_model(model, {"input": torch.randn(4, 64)}, policy="memory", seconds=0.01)
    assert set(found.result.seconds) == {"eager", "torch.compile", "vnm"}
    assert found.difference < 1e-6
    assert found.explanation["0"].decision == "sparse"
    assert json.loads(json.dumps(found.to_dict()))["rounds"] == found.result.rounds >= 7
    assert "outputs differ by" in str(found)
    assert isinstance(model[0].weight, vnm.VNMTensor), "the model stays as it is"
    text = Page("a model", found.explanation, None, found).html()
    check(text)
    assert "measured, whole model" in text


@pytest.mark.slow
def test_inspect_a_config_alone(config, tmp_path):
    given = ("--blocks", 1, "--spec", "16:2:8", "--length", 8, "--target", "sm_90", "--save", tmp_path / "out")
    report = json.loads(run("inspect", config, *given, "--json"))
    assert report["target"] == "sm_90"
    sparse = [each for each in report["kernels"] if (each["template"] or "").startswith(("vnm_", "sparse_"))]
    assert sparse
    assert all(each["registers"] > 0 and each["bytes"] > 0 and each["roofline_seconds"] > 0 for each in sparse)
    assert list((tmp_path / "out").rglob("*.ptx"))


@pytest.mark.slow
def test_inspect_here(compressed):
    shown = run("inspect", compressed, "--length", 8)
    assert "kernels for this machine's CPU" in shown


def test_inputs_from_a_file(compressed, tmp_path):
    save_file({"input_ids": torch.arange(40).view(5, 8)}, tmp_path / "inputs.safetensors")
    given = example_inputs(sparse_model(compressed, None, None, True), 2, 100, tmp_path / "inputs.safetensors")
    assert torch.equal(given["input_ids"], torch.arange(16).view(2, 8))
    assert "there is no file" in one_line(run("inspect", compressed, "--inputs", tmp_path / "none", code=1))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (ViTConfig(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                   num_attention_heads=2, architectures=["ViTModel"]), {"pixel_values": (2, 3, 32, 32)}),
        (T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2,
                  architectures=["T5ForConditionalGeneration"]),
         {"input_ids": (2, 8), "attention_mask": (2, 8), "decoder_input_ids": (2, 8)}),
        (Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                        architectures=["Wav2Vec2Model"]), None),
    ],
    ids=["images", "encoder and decoder", "sound"],
)  # fmt: skip
def test_inputs_are_made_up_or_asked_for(tmp_path, made, expected):
    made.save_pretrained(tmp_path)
    model = sparse_model(tmp_path, "16:2:8", None, True)
    if expected is None:
        with pytest.raises(vnm.VNMError, match="give them by --inputs"):
            example_inputs(model, 2, 8)
        return
    given = example_inputs(model, 2, 8)
    assert {name: tuple(value.shape) for name, value in given.items()} == expected
    model(**given)


def test_what_is_no_use(config, compressed, tmp_path):
    assert "give the directory of a model" in one_line(run("bench", tmp_path / "none", code=1))
    assert "--blocks is for a config alone" in one_line(run("bench", compressed, "--blocks", 1, code=1))
    assert "compressed already" in one_line(run("bench", compressed, "--spec", "16:2:8", code=1))
    assert "target 'sm_1' is unknown" in one_line(run("inspect", compressed, "--target", "sm_1", code=1))
    assert "holds no config.json" in one_line(run("bench", tmp_path, code=1))
    dense = LlamaForCausalLM(llama(1))
    dense.save_pretrained(tmp_path / "dense")
    assert "give --spec" in one_line(run("bench", tmp_path / "dense", code=1))
    run("nothing", code=2)


class Tags(HTMLParser):
    """Tags that are open, and what the page would load from elsewhere."""

    ALONE = ("meta", "link", "br", "img", "path", "use", "rect", "line", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.ALONE:
            assert self.open.pop() == tag


def check(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    assert tags.loaded == [], "the page needs nothing from elsewhere"
    return tags


@pytest.fixture(scope="module")
def page(compressed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "page.html"
    assert "written to" in run("report", compressed, "--out", out, "--length", 8)
    assert "exists" in one_line(run("report", compressed, "--out", out, code=1))
    return out


@pytest.mark.slow
def test_report(page):
    text = page.read_text()
    check(text)
    for expected in ("7 of 8", "model.layers.0.mlp.down_proj", "16:2:8", "<svg", "measured, whole model", "#include"):
        assert expected in text, expected


@pytest.mark.slow
def test_report_for_a_gpu(compressed, tmp_path):
    run("report", compressed, "--out", tmp_path / "page.html", "--length", 8, "--target", "sm_90", "--no-bench")
    text = (tmp_path / "page.html").read_text()
    check(text)
    for expected in ("H200", "registers", "tl.load".replace(".", '</span><span class="o">.</span><span class="n">')):
        assert expected in text, expected
    assert "measured, whole model" not in text


def test_names_from_outside_are_text():
    layer = LayerReport("<script>alert(1)</script>\x1b[31m", (4, 4), "1:2:4", 0.5, 64, 40, "sparse", "<b>why</b>")
    text = Page("<i>title</i>", Explanation([layer], 1, "cpu")).html()
    check(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in text
    assert "&lt;b&gt;why&lt;/b&gt;" in text
    assert "&lt;i&gt;title&lt;/i&gt;" in text


@pytest.mark.slow
@pytest.mark.browser
def test_report_in_a_browser(page, tmp_path):
    """It renders: the document after scripts and layout holds what it should, and the picture is no blank one."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2000"]
    dump = [CHROMIUM, *flags, "--dump-dom", page.as_uri()]
    dumped = subprocess.run(dump, capture_output=True, text=True, timeout=120)
    assert "<h2>Roofline</h2>" in dumped.stdout
    picture = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=120
    )
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(picture))[..., :3]
    rows = (pixels != pixels[0, 0]).any(-1).any(-1)
    assert rows.float().mean() > 0.3
