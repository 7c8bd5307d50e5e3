"""Small models and data that every machine has, for benchmarks of training: digits of scikit-learn, text of Python.

A task is made for a seed, which splits the data, and draws its batches from torch's generator.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.blocks import EncoderBlock

WIDTH, DEPTH, HEADS = 128, 3, 4


class Task(Protocol):
    """Something to learn. The linears of the model's `blocks` are what is pruned."""

    title: str

    def __init__(self, seed: int) -> None: ...

    def model(self) -> nn.Module:
        """A new model, of random weights."""

    def loss(self, model: nn.Module) -> Tensor:
        """Of a batch to train on."""

    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on what is held out."""


def blocks(causal: bool) -> nn.Sequential:
    """What both models are made of."""
    made = (EncoderBlock(WIDTH, 4 * WIDTH, HEADS, pre_norm=True, causal=causal) for _ in range(DEPTH))
    return nn.Sequential(*made)


class ViT(nn.Module):
    """16 patches of 2 x 2 pixels, 3 blocks of 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = blocks(causal=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images [batch, 8, 8] to logits [batch, 10]."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.blocks(self.embed(patches) + self.positions).mean(1))


class Digits:
    """Handwritten digits, 1,797 images of 8 x 8, of which 500 are held out."""

    title = "A small ViT on digits"
    BATCH, HELD_OUT = 64, 500

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        kept, held = order[self.HELD_OUT :], order[: self.HELD_OUT]
        self.images, self.labels = images[kept], labels[kept]
        self.held, self.expected = images[held], labels[held]

    def model(self) -> nn.Module:
        """Of random weights."""
        return ViT()

    def loss(self, model: nn.Module) -> Tensor:
        """Cross entropy of a batch."""
        chosen = torch.randint(len(self.images), (self.BATCH,))
        return F.cross_entropy(model(self.images[chosen]), self.labels[chosen])

    @torch.no_grad()
    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Cross entropy and accuracy on images that are held out."""
        logits = model(self.held)
        accuracy = (logits.argmax(1) == self.expected).float().mean()
        return F.cross_entropy(logits, self.expected).item(), accuracy.item()


class GPT(nn.Module):
    """Characters, 3 causal blocks of 128 channels."""

    def __init__(self, characters: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(context, WIDTH))
        self.blocks = blocks(causal=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, T] to logits [batch, T, characters]."""
        return self.head(self.norm(self.blocks(self.embed(ids) + self.positions[: ids.shape[1]])))


class Text:
    """The next character of Python's documentation, a tenth of it held out; paragraphs that repeat are left out."""

    title = "A small GPT on Python's documentation"
    BATCH, CONTEXT, PIECE, PIECES = 16, 64, 4096, 10

    def __init__(self, seed: int) -> None:
        paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        text = "\n\n".join(dict.fromkeys(paragraphs))
        alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
        self.characters = len(alphabet)
        ids = torch.tensor([alphabet[character] for character in text])
        pieces = ids[: len(ids) // self.PIECE * self.PIECE].view(-1, self.PIECE)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
        self.pieces = pieces[order[self.PIECES :]]
        size = self.CONTEXT + 1
        self.held = pieces[order[: self.PIECES], : self.PIECE // size * size].reshape(-1, size)

    def model(self) -> nn.Module:
        """Of random weights."""
        return GPT(self.characters, self.CONTEXT)

    def loss(self, model: nn.Module) -> Tensor:
        """Cross entropy a character of a batch."""
        rows = torch.randint(len(self.pieces), (self.BATCH, 1))
        starts = torch.randint(self.PIECE - self.CONTEXT, (self.BATCH, 1))
        ids = self.pieces[rows, starts + torch.arange(self.CONTEXT + 1)]
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Cross entropy a character and share of characters that are predicted, on pieces that are held out."""
        logits = torch.cat([model(part[:, :-1]) for part in self.held.split(64)])
        expected = self.held[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), expected.flatten())
        return loss.item(), (logits.argmax(2) == expected).float().mean().item()


TASKS: dict[str, type[Task]] = {"digits": Digits, "text": Text}
