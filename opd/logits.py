"""Logits in tiles: the products with an output head, and the gradients back through them.

The one idea: a tile of tokens by vocabulary entries is multiplied out, reduced to a few numbers per token that parts of
the vocabulary merge from, and overwritten by the next one. Parts may be tiles of one process or shards of many ranks
(`Shard`): the sums merge alike. The vocabulary is the outer loop, so that rows of a head are cast once, and a head's
gradient is finished tile by tile.

Two choices hold everywhere. Products and sums are float32 whatever the inputs' dtype (float64 if an input is float64):
rounding logits to bfloat16 would cost several per cent of a KL. Logits are in bits, that is multiplied by log2(e) along
with the division by the temperature, because 2 ** x takes a third of the time of e ** x; `NATS` turns a number of bits
into nats.

Left out: the sums that tiles are reduced to (`opd.softmax`), and what is computed from them (`opd.losses` of one model,
`opd.divergence` of two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from opd.kernels import products

NATS = math.log(2.0)
# Measured on a CPU with 1 MiB of second-level cache per core: a tile larger than the caches makes every pass over it
# three times as long, one with fewer rows makes the products slower.
TILE_TOKENS, TILE_VOCAB = 512, 2048
_KEPT_TILES = 8  # up to so many tiles of logits are kept for the backward instead of being made again


class TileSizes(TypedDict):
    """What callers pass on as keyword arguments."""

    tile_tokens: int
    tile_vocab: int


@dataclass(slots=True, kw_only=True, frozen=True)
class Shard:
    """This rank's rows of a head of which every rank of `group` has some: ids first_id, first_id + 1, ...

    Hidden states, ids and upstream gradients are the same on all ranks; so are results and gradients of hidden states.
    """

    first_id: int
    group: dist.ProcessGroup


@dataclass(slots=True, kw_only=True, frozen=True)
class Tiling:
    """How a [N, V] matrix of logits is cut, and the temperature that divides them."""

    temperature: float = 1.0
    tile_tokens: int = TILE_TOKENS
    tile_vocab: int = TILE_VOCAB
    shard: Shard | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "tile_tokens", "tile_vocab"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be positive")

    @property
    def scale(self) -> float:
        """What a product of states and head is multiplied by to be a logit in bits."""
        return 1.0 / (NATS * self.temperature)

    @property
    def first_id(self) -> int:
        return 0 if self.shard is None else self.shard.first_id

    def keeps(self, num_tokens: int, vocab_size: int) -> bool:
        return num_tokens * vocab_size <= _KEPT_TILES * self.tile_tokens * self.tile_vocab

    def sum_over_ranks(self, columns: list[Tensor]) -> list[Tensor]:
        """Columns [N, ...] of one dtype, each summed over the ranks that share the vocabulary."""
        return self._over_ranks(columns, dist.ReduceOp.SUM)

    def max_over_ranks(self, columns: list[Tensor]) -> list[Tensor]:
        return self._over_ranks(columns, dist.ReduceOp.MAX)

    def _over_ranks(self, columns: list[Tensor], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
        if self.shard is None:
            return columns
        merged = torch.cat([column.reshape(-1) for column in columns])
        dist.all_reduce(merged, operation, group=self.shard.group)
        parts = merged.split([column.numel() for column in columns])
        return [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class Logits:
    """hidden [N, D] @ head [V, D].T in bits, one tile at a time, and gradients through it.

    Used as: for each slice of `vocab` `enter`, then for each slice of `tokens` `tile`; in a backward `add_gradient`
    after it, and `leave` at the end of the vocabulary tile.
    """

    def __init__(self, hidden: Tensor, head: Tensor, tiling: Tiling, dtype: torch.dtype) -> None:
        self._hidden, self._head, self._tiling, self._dtype = hidden, head, tiling, dtype
        self.vocab, self.tokens = _cut(len(head), tiling.tile_vocab), _cut(len(hidden), tiling.tile_tokens)
        self._scale = tiling.scale
        self._rows = head.new_empty(min(tiling.tile_vocab, len(head)), head.shape[1], dtype=dtype)
        self._vocab = slice(0, 0)
        self.hidden_grad: Tensor | None = None
        self.head_grad: Tensor | None = None
        self._head_grad_tile: Tensor | None = None

    def enter(self, vocab: slice) -> None:
        self._vocab = vocab
        self._current = self._rows[: vocab.stop - vocab.start].copy_(self._head[vocab]).mul_(self._scale)
        if self.head_grad is not None:
            exact = self.head_grad.dtype == self._dtype
            self._head_grad_tile = self.head_grad[vocab] if exact else torch.zeros_like(self._current)

    def tile(self, tokens: slice, scratch: Tensor | None) -> Tensor:
        """Logits [n, v] in the memory of `scratch` (1-dim, large enough), or in new memory."""
        states = self._hidden[tokens].to(self._dtype)
        shape = (len(states), len(self._current))
        out = view(scratch, shape) if scratch is not None else states.new_empty(shape)
        return products.matmul(states, self._current.T, out)

    def at_ids(self, ids: Tensor) -> Tensor:
        """Logits of the ids [N, K] alone, 0 where an id lies in no row of this head."""
        found = []
        rows = max(1, self._rows.numel() // max(1, ids.shape[1] * self._head.shape[1]))
        for tokens in _cut(len(ids), rows):
            local = ids[tokens] - self._tiling.first_id
            inside = (local >= 0) & (local < len(self._head))
            chosen = self._head[local.clamp(0, len(self._head) - 1)].to(self._dtype)
            logits = (chosen @ self._hidden[tokens].to(self._dtype)[:, :, None])[:, :, 0] * self._scale
            found.append(torch.where(inside, logits, 0.0))
        return torch.cat(found)

    def scratch(self, count: int) -> list[Tensor]:
        """Memory for `count` tiles, to be seen through `view`."""
        size = min(len(self._hidden), self._tiling.tile_tokens) * len(self._rows)
        return [self._rows.new_empty(size) for _ in range(count)]

    def local(self, ids: Tensor, tokens: slice) -> Tensor:
        """Rows of global ids [N, K], counted from the first entry of the vocabulary tile that was entered."""
        return ids[tokens] - (self._tiling.first_id + self._vocab.start)

    def start_gradients(self, needs_hidden: bool, needs_head: bool) -> None:
        if needs_hidden:
            self.hidden_grad = torch.zeros_like(self._hidden, dtype=self._dtype)
        if needs_head:
            self.head_grad = torch.zeros_like(self._head)

    def add_gradient(self, tokens: slice, gradient: Tensor) -> None:
        """`gradient` [n, v] is that of the loss in the logits, in bits, of the vocabulary tile that was entered."""
        if self.hidden_grad is not None:
            products.matmul(gradient, self._current, self.hidden_grad[tokens], add=True)
        if self._head_grad_tile is not None:
            products.matmul(gradient.T, self._hidden[tokens].to(self._dtype), self._head_grad_tile, add=True)

    def leave(self) -> None:
        if self.head_grad is not None and self._head_grad_tile is not None:
            self._head_grad_tile.mul_(self._scale)
            if self._head_grad_tile.dtype != self.head_grad.dtype:
                self.head_grad[self._vocab] = self._head_grad_tile

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden, summed over ranks, and of head, in their dtypes."""
        hidden_grad = self.hidden_grad
        if hidden_grad is not None:
            hidden_grad = self._tiling.sum_over_ranks([hidden_grad])[0].to(self._hidden.dtype)
        return hidden_grad, self.head_grad

    def refuse_infinite(self) -> None:
        """Raises ValueError naming the first logit that is not finite, on all ranks if one of them has it; returns if
        there is none."""
        problem: str | None = None
        for vocab in self.vocab:
            self.enter(vocab)
            for tokens in self.tokens:
                bad = ~(logits := self.tile(tokens, None)).isfinite()
                if problem is None and bad.any():
                    row, column = bad.nonzero()[0].tolist()
                    problem = (
                        f"the teacher's logit of token id {self._tiling.first_id + vocab.start + column} is "
                        f"{logits[row, column].item()} at position {tokens.start + row}"
                    )
        # Ranks raise together, or one would wait for the others.
        if self._tiling.max_over_ranks([self._rows.new_tensor([problem is not None])])[0].item() > 0:
            raise ValueError(
                f"{problem or 'a logit of the teacher is not finite on another rank'}; a comparison over the whole "
                "vocabulary needs a finite teacher logit for every id (cut the rows of a padded vocabulary from both "
                "heads)"
            )


def shift(logits: Tensor) -> Tensor:
    """Subtracts each row's maximum in place and returns the maxima [n]."""
    top = logits.amax(dim=-1)
    logits.sub_(top[:, None])
    return top


def gather_ids(logits: Tensor, local_ids: Tensor) -> Tensor:
    """Logits of the ids [n, K], 0 where an id lies outside the tile."""
    inside = (local_ids >= 0) & (local_ids < logits.shape[1])
    return torch.where(inside, logits.gather(1, local_ids.clamp(0, logits.shape[1] - 1)), 0.0)


def scatter_ids(gradient: Tensor, local_ids: Tensor, values: Tensor) -> None:
    """Adds `values` [n, K] to a tile in place at the ids that lie in it."""
    inside = (local_ids >= 0) & (local_ids < gradient.shape[1])
    gradient.scatter_add_(1, local_ids.clamp(0, gradient.shape[1] - 1), torch.where(inside, values, 0.0))


def _cut(total: int, tile: int) -> list[slice]:
    """Slices that cover range(total); one empty slice for a total of 0."""
    return [slice(start, min(start + tile, total)) for start in range(0, max(total, 1), tile)]


def view(scratch: Tensor, shape: tuple[int, int]) -> Tensor:
    return scratch[: shape[0] * shape[1]].view(shape)


def check_head(side: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        raise ValueError(
            f"{side}hidden has shape {tuple(hidden.shape)} and {side}head {tuple(head.shape)}; they must be "
            "[tokens, width] and [vocabulary, width] with the same width"
        )


def check_ids(ids: Tensor, num_tokens: int, side: str, head: Tensor, tiling: Tiling) -> None:
    if ids.dim() not in (1, 2) or len(ids) != num_tokens or ids.dtype != torch.int64:
        raise ValueError(
            f"targets is {ids.dtype} of shape {tuple(ids.shape)}; it must be torch.int64, one id or one row of ids for "
            f"each of {num_tokens} tokens"
        )
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if tiling.shard is None and (low < 0 or high >= len(head)):
            raise ValueError(f"targets has ids from {low} to {high}; {side}head has ids 0 to {len(head) - 1}")
        inside = (ids >= tiling.first_id) & (ids < tiling.first_id + len(head))
        if not bool((tiling.sum_over_ranks([inside.float()])[0] == 1).all()):
            raise ValueError(
                f"targets has ids from {low} to {high}, of which some lie in no shard, or in more than one"
            )
