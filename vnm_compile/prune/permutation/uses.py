"""What a weight keeps under V:N:M when channels change places: the two sides of the search."""

from __future__ import annotations

import torch
from torch import Tensor

from vnm_compile.prune.columns import choose_columns, column_value, value_with_each
from vnm_compile.spec import KEPT_COLUMNS, Spec

_CHUNK_ELEMENTS = 1 << 22  # scores that are worked on at a time


class _Use:
    """Scores in the present order, padded to whole blocks, and the columns that each block keeps at present."""

    def __init__(self, scores: Tensor, spec: Spec, positions: Tensor) -> None:
        out_features, in_features = scores.shape
        rows, groups = spec.rows(out_features), spec.groups(in_features)
        pad = (0, groups * spec.m - in_features, 0, rows - out_features)
        self.spec = spec
        self.positions = positions.to(scores.device)
        self.scores = torch.nn.functional.pad(scores, pad)
        start = choose_columns(self._blocks(slice(None)), spec.n) if spec.m <= 8 else None
        self.kept = start if start is not None else self._first_columns()  # [B, G, 4]
        self._improve()

    def _blocks(self, which: slice) -> Tensor:
        """Scores of some rows of blocks: a view `[b, G, V, M]`."""
        v, m = self.spec.v, self.spec.m
        return self.scores.view(-1, v, self.scores.shape[1] // m, m)[which].transpose(1, 2)

    def _chunks(self) -> list[slice]:
        """Rows of blocks that are worked on together."""
        step = max(1, _CHUNK_ELEMENTS // (self.spec.v * self.scores.shape[1]))
        count = self.scores.shape[0] // self.spec.v
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _first_columns(self) -> Tensor:
        """The 4 columns of the largest sums."""
        parts = [self._blocks(each).sum(2).topk(KEPT_COLUMNS, dim=2).indices for each in self._chunks()]
        return torch.cat(parts).sort(2).values

    def worth(self, places: Tensor) -> Tensor:
        """What is kept at each of these places with the channel of each in it, at the least: `[places, channels]`."""
        raise NotImplementedError

    def move(self, places: Tensor, sources: Tensor) -> None:
        """Give each place the channel that is in `sources` at present."""
        raise NotImplementedError

    def value(self) -> float:
        """The sum of scores that is kept."""
        parts = [column_value(self._blocks(each), self.kept[each], self.spec.n).sum() for each in self._chunks()]
        return float(sum(parts))

    def _improve(self) -> None:
        """Exchange one kept column of each block for another where that keeps more."""
        if self.spec.m == KEPT_COLUMNS:
            return
        for chunk in self._chunks():
            blocks = self._blocks(chunk)
            flat = blocks.reshape(-1, *blocks.shape[2:])
            kept = self.kept[chunk].reshape(-1, KEPT_COLUMNS)
            best, winner = column_value(flat, kept, self.spec.n) * (1 + 1e-6), kept
            for position in range(KEPT_COLUMNS):
                others = torch.cat([kept[:, :position], kept[:, position + 1 :]], 1)
                values, column = value_with_each(flat, others, self.spec.n).max(1)
                better = (values > best).unsqueeze(1)
                winner = torch.where(better, torch.cat([others, column.unsqueeze(1)], 1), winner)
                best = torch.maximum(best, values)
            self.kept[chunk] = winner.view_as(self.kept[chunk])


class ColumnUse(_Use):
    """A weight whose columns follow the order of channels."""

    @property
    def groups(self) -> Tensor:
        """The groups of columns that each channel is in: int64 `[channels, copies]`."""
        return self.positions // self.spec.m

    def worth(self, places: Tensor) -> Tensor:
        """What the groups of each place keep, at the least, with each channel in it: `[places, channels]`.

        The places are in different groups; channels are named by the places they have at present.
        """
        total = self.scores.new_zeros(len(places), len(places))
        for copy in range(self.positions.shape[1]):
            columns = self.positions[places, copy]
            for chunk in self._chunks():
                total += self._worth(columns, chunk)
        return total

    def _worth(self, columns: Tensor, chunk: slice) -> Tensor:
        n, m = self.spec.n, self.spec.m
        group, slot = columns // m, columns % m
        blocks = self._blocks(chunk)[:, group]  # [b, P, V, M]
        kept = self.kept[chunk][:, group]  # [b, P, 4]
        b, p, v, _ = blocks.shape
        flat, kept, own = blocks.reshape(-1, v, m), kept.reshape(-1, KEPT_COLUMNS), slot.repeat(b)
        three, without = self._beside(flat, kept, own)
        largest = flat.gather(2, three.unsqueeze(1).expand(-1, v, -1)).topk(n, dim=2).values  # [bP, V, n]
        base, threshold = largest.sum((1, 2)).view(b, p, 1), largest[..., -1].view(b, p, v)
        candidates = self.scores.view(-1, v, self.scores.shape[1])[chunk][:, :, columns].transpose(1, 2)  # [b, P, V]
        # The sum of max(0, c - t) over rows is half of |c - t| + c - t, and of |c - t| an L1 distance.
        distance = torch.cdist(threshold.contiguous(), candidates.contiguous(), p=1.0)
        gain = (distance + candidates.sum(2).unsqueeze(1) - threshold.sum(2).unsqueeze(2)) / 2
        return torch.maximum(base + gain, without.view(b, p, 1)).sum(0)

    def _beside(self, blocks: Tensor, kept: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Three columns to keep beside a newcomer in column `own`, and what is kept of four others: `[X, 3]`, `[X]`."""
        n = self.spec.n
        is_own = kept == own.unsqueeze(1)
        # Where the own column is not kept, the newcomer replaces the column that is missed least.
        values = torch.stack(
            [column_value(blocks, torch.cat([kept[:, :i], kept[:, i + 1 :]], 1), n) for i in range(KEPT_COLUMNS)], 1
        )
        leaves = torch.where(is_own.any(1), is_own.int().argmax(1), values.argmax(1))
        stays = torch.ones_like(kept, dtype=torch.bool).scatter_(1, leaves.unsqueeze(1), False)
        three = kept[stays].view(-1, KEPT_COLUMNS - 1)
        if self.spec.m == KEPT_COLUMNS:
            return three, column_value(blocks, three, n)
        others = value_with_each(blocks, three, n).scatter(1, own.unsqueeze(1), -torch.inf)
        return three, others.amax(1)

    def move(self, places: Tensor, sources: Tensor) -> None:
        """Give each place the channel that is in `sources` at present."""
        self.scores[:, self.positions[places].flatten()] = self.scores[:, self.positions[sources].flatten()]
        self._improve()


class RowUse(_Use):
    """A weight whose rows follow the order of channels."""

    def worth(self, places: Tensor) -> Tensor:
        """What is kept of each channel's rows in the block of each place: `[places, channels]`."""
        total = self.scores.new_zeros(len(places), len(places))
        for copy in range(self.positions.shape[1]):
            rows = self.positions[places, copy]
            blocks, which = (rows // self.spec.v).unique(return_inverse=True)
            scores = self.scores[rows].view(len(rows), -1, self.spec.m)  # [P, G, M]
            kept = [self._kept_of(scores, self.kept[block]) for block in blocks]
            total += torch.stack(kept)[which]
        return total

    def _kept_of(self, scores: Tensor, columns: Tensor) -> Tensor:
        """What rows `[P, G, M]` keep with a block's columns `[G, 4]`: `[P]`."""
        a, b, c, d = scores.gather(2, columns.expand(len(scores), -1, -1)).unbind(2)
        larger = torch.maximum(a, b), torch.maximum(c, d)
        if self.spec.n == 1:
            return torch.maximum(*larger).sum(1)
        return torch.maximum(larger[0] + larger[1], torch.maximum(a + b, c + d)).sum(1)

    def move(self, places: Tensor, sources: Tensor) -> None:
        """Give each place the channel that is in `sources` at present."""
        self.scores[self.positions[places].flatten()] = self.scores[self.positions[sources].flatten()]
        self._improve()
