"""llama.cpp on a model of the same shape and random weights, by its Python bindings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.generate_models import SHAPES

BLOCK = 32  # values that share a scale
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}  # with a scale of 2 bytes in front


def write_model(path: Path, shape: str, kind: str) -> None:
    """Write a GGUF file: weights of random integers with one scale, norms of ones, a vocabulary of numbers."""
    import gguf
    import numpy as np

    sizes = SHAPES[shape]
    hidden, vocabulary, blocks = sizes["hidden_size"], sizes["vocab_size"], sizes["num_hidden_layers"]
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    random = np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> None:
        stored = random.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES[kind]), dtype=np.uint8)
        scale = np.float16(columns**-0.5 / (64 if kind == "Q8_0" else 4))
        stored[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        writer.add_tensor(name, stored.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    weight("token_embd.weight", vocabulary, hidden)
    for i in range(blocks):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for name, rows in (
            ("attn_q", hidden),
            ("attn_k", hidden * shared // heads),
            ("attn_v", hidden * shared // heads),
        ):
            weight(f"blk.{i}.{name}.weight", rows, hidden)
        weight(f"blk.{i}.attn_output.weight", hidden, hidden)
        weight(f"blk.{i}.ffn_gate.weight", sizes["intermediate_size"], hidden)
        weight(f"blk.{i}.ffn_up.weight", sizes["intermediate_size"], hidden)
        weight(f"blk.{i}.ffn_down.weight", hidden, sizes["intermediate_size"])
    norm("output_norm.weight")
    weight("output.weight", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path, threads: int) -> Any:
    """The model of a file."""
    from llama_cpp import Llama

    return Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def generate(model: Any, prompt: list[int], tokens: int) -> Iterator[float]:
    """The moments at which each of `tokens` tokens is there, greedily, after all of the prompt."""
    model.reset()
    model.eval(prompt)
    for i in range(tokens):
        token = model.sample(temp=0.0)
        yield time.perf_counter()
        if i + 1 < tokens:
            model.eval([token])
