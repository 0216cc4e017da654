"""Muon's optimizer divided among ranks: ZeRO stages 1 and 2 by whole matrices (V4 report 3.4.1).

DeepSpeed's ZeRO cuts the flat list of all weights into equal slices, and a slice of a matrix cannot be orthogonalised.
So with Muon the partition is this file's own, and DeepSpeed's engine runs at stage 0 below it: each rank owns pieces,
a piece being whole matrices of one parameter, or any stretch of a parameter that AdamW trains. Only the owner holds a
piece's optimizer state and steps it; then it sends the new weights to the others. Stage 1: gradients are summed on all
ranks. Stage 2: they are summed on their owner alone, during the backward, and no rank keeps another's.

Balanced are the work of Newton-Schulz over the Muon pieces and then, by the pieces that AdamW trains and that can be
cut anywhere, the bytes of state. Left out: stage 3 (weights themselves divided), which `opd.learner` refuses with Muon,
and the report's redundant owners across many data-parallel groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd.muon import SETTLE_STEPS, STEEP_STEPS, MuonAdamW

BUCKET_NUMBERS = 1 << 22  # small pieces travel together up to this many numbers
SMALLEST_CUT = 1 << 12  # numbers below which a parameter of AdamW's is not worth cutting
STATE_BYTES = {"muon": 4, "adamw": 8}  # per number


@dataclass(slots=True, kw_only=True, frozen=True)
class Piece:
    """A contiguous stretch of one parameter: numbers start to end of it, flattened.

    Example: experts [8, 64, 32] with blocks (32, 32) on two ranks are two pieces, of shape [4, 64, 32], each of eight
    independent matrices.
    """

    group: int  # index of its parameter group
    index: int  # of its parameter in the group
    start: int
    shape: tuple[int, ...]  # of the stretch
    blocks: tuple[int, ...]  # as `opd.muon.Assignment` has them; empty for AdamW
    owner: int = 0  # rank

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.start + self.numel


def partition(groups: Sequence[dict[str, Any]], num_ranks: int) -> list[Piece]:
    """Cuts the parameters of `MuonAdamW` groups into pieces and gives each an owner; the same on every rank.

    The most laden rank has at most a piece more than its share, and no parameter is in more pieces than there are
    ranks.
    """
    pieces: list[Piece] = []
    for group_index, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if group["algorithm"] == "muon":
                stretches = _matrices(tuple(parameter.shape), tuple(group["blocks"][index]), num_ranks)
            else:
                stretches = _slices(tuple(parameter.shape), num_ranks)
            start = 0
            for shape, blocks in stretches:
                pieces.append(Piece(group=group_index, index=index, start=start, shape=shape, blocks=blocks))
                start = pieces[-1].end
    work, state = [0.0] * num_ranks, [0.0] * num_ranks
    owned: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (not piece.blocks, -_cost(piece))):  # stable, so the same everywhere
        load = work if piece.blocks else state
        owner = load.index(min(load))
        work[owner] += _cost(piece)
        state[owner] += piece.numel * STATE_BYTES[groups[piece.group]["algorithm"]]
        owned.append(replace(piece, owner=owner))
    return sorted(owned, key=lambda piece: (piece.group, piece.index, piece.start))


def _matrices(
    shape: tuple[int, ...], blocks: tuple[int, ...], num_ranks: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape, blocks) of at most `num_ranks` stretches of whole matrices, in order."""
    *leading, rows, columns = shape
    count = math.prod(leading)
    if count > 1:
        return [((size, rows, columns), blocks) for size in _even(count, num_ranks)]
    ends = [0, *itertools.accumulate(_even(len(blocks), num_ranks))]
    parts = [blocks[begin:end] for begin, end in itertools.pairwise(ends)]
    return [((sum(part), columns), part) for part in parts]


def _slices(shape: tuple[int, ...], num_ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Flat stretches of a parameter that is trained number by number."""
    numel = math.prod(shape)
    return [((size,), ()) for size in _even(numel, min(num_ranks, max(1, numel // SMALLEST_CUT)))]


def _even(count: int, parts: int) -> list[int]:
    """`count` in at most `parts` shares that differ by one at most; none is zero."""
    parts = min(count, parts)
    return [count // parts + (part < count % parts) for part in range(parts)]


def _cost(piece: Piece) -> float:
    """Multiplications of a step: Newton-Schulz over a stretch of matrices, or AdamW's few for each number."""
    if not piece.blocks:
        return 4 * piece.numel
    total = 0
    for rows in piece.blocks:
        short, long = sorted((rows, piece.shape[-1]))
        total += 2 * short * short * long + short**3
    return math.prod(piece.shape[:-2]) * total * (STEEP_STEPS + SETTLE_STEPS)


class Shards:
    """This rank's pieces, the optimizer over them, and the messages before and after its step.

    `optimizer` sees each piece as a parameter of its own that shares the model's memory. Methods are called on all
    ranks. With `divides_gradients` (stage 2) a parameter's gradient is taken away once its backward has made it and
    goes to its owners, from the model's last parameter to its first on every rank alike, whatever the order in which
    gradients are ready; a parameter that got none counts as zero.
    """

    def __init__(
        self, model: nn.Module, whole: MuonAdamW, rank: int, num_ranks: int, *, divides_gradients: bool
    ) -> None:
        """`whole` is the optimizer of all parameters; it lends its groups and is not stepped."""
        self.rank, self.num_ranks, self.divides_gradients = rank, num_ranks, divides_gradients
        self.groups = [list(group["params"]) for group in whole.param_groups]
        self.pieces = partition(whole.param_groups, num_ranks)
        self.views: dict[Piece, nn.Parameter] = {}  # own pieces
        local: list[dict[str, Any]] = []
        for index, group in enumerate(whole.param_groups):
            mine = [piece for piece in self.pieces if piece.group == index and piece.owner == rank]
            for piece in mine:
                self.views[piece] = nn.Parameter(self._stretch(piece).view(piece.shape))
            local.append({**group, "params": [self.views[piece] for piece in mine]})
            if group["algorithm"] == "muon":
                local[-1]["blocks"] = [piece.blocks for piece in mine]
        self.optimizer = MuonAdamW(local, steep_dtype=whole.steep_dtype)
        if divides_gradients:
            trained = {id(parameter) for group in self.groups for parameter in group}
            self._order = [parameter for parameter in model.parameters() if id(parameter) in trained][::-1]
            self._place = {id(parameter): place for place, parameter in enumerate(self._order)}
            self._pieces_of: list[list[Piece]] = [[] for _ in self._order]
            for piece in self.pieces:
                self._pieces_of[self._place[id(self.parameter(piece))]].append(piece)
            self._ready: set[int] = set()
            self._next = 0  # place of the first gradient that has not been taken
            self._waiting: list[tuple[Piece, Tensor]] = []
            for parameter in self._order:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def parameter(self, piece: Piece) -> nn.Parameter:
        return self.groups[piece.group][piece.index]

    def finish_backward(self) -> None:
        """After each backward. Stage 2: the gradients that are left go to their owners."""
        if self.divides_gradients:
            self._take(len(self._order))
            self._send()
            self._ready.clear()
            self._next = 0

    def gradients(self) -> list[Tensor]:
        """What the step's gradient is on this rank: all of it at stage 1, its own part at stage 2."""
        if self.divides_gradients:
            return [view.grad for view in self.views.values() if view.grad is not None]
        return [p.grad for group in self.groups for p in group if p.grad is not None]

    def attach(self) -> None:
        """Before a step. Stage 1: own pieces see their part of the summed gradients."""
        if not self.divides_gradients:
            for piece, view in self.views.items():
                gradient = self.parameter(piece).grad
                view.grad = None if gradient is None else _part(gradient, piece).view(piece.shape)

    def drop_gradients(self) -> None:
        for view in self.views.values():
            view.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """After a step: every rank gets the new weights from their owners."""
        self.drop_gradients()
        if self.num_ranks == 1:
            return
        for owner in range(self.num_ranks):
            stretches = [(piece, self._stretch(piece)) for piece in self.pieces if piece.owner == owner]
            for bucket in _buckets(stretches):
                joined = _join(bucket)
                dist.broadcast(joined, src=owner)
                if len(bucket) > 1 and owner != self.rank:
                    sizes = [piece.numel for piece, _ in bucket]
                    for (_, stretch), part in zip(bucket, joined.split(sizes), strict=True):
                        stretch.copy_(part)

    def _stretch(self, piece: Piece) -> Tensor:
        return _part(self.parameter(piece).data, piece)

    def _on_gradient(self, parameter: Tensor) -> None:
        self._ready.add(self._place[id(parameter)])
        end = self._next
        while end in self._ready:
            end += 1
        self._take(end)

    @torch.no_grad()
    def _take(self, end: int) -> None:
        """Takes the gradients of the parameters up to place `end`, and sends them once they are enough."""
        for place in range(self._next, end):
            parameter = self._order[place]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            self._waiting.extend((piece, _part(gradient, piece)) for piece in self._pieces_of[place])
            if sum(piece.numel for piece, _ in self._waiting) >= BUCKET_NUMBERS:
                self._send()
        self._next = end

    @torch.no_grad()
    def _send(self) -> None:
        for owner in range(self.num_ranks):
            for bucket in _buckets([entry for entry in self._waiting if entry[0].owner == owner]):
                joined = _join(bucket)
                if self.num_ranks > 1:
                    dist.reduce(joined, dst=owner)
                if owner == self.rank:
                    sizes = [piece.numel for piece, _ in bucket]
                    for (piece, _), part in zip(bucket, joined.split(sizes), strict=True):
                        view = self.views[piece]
                        total = part.view(piece.shape)
                        view.grad = total.clone() if view.grad is None else view.grad.add_(total)
        self._waiting = []


def _part(whole: Tensor, piece: Piece) -> Tensor:
    return whole.view(-1)[piece.start : piece.end]


def _join(bucket: list[tuple[Piece, Tensor]]) -> Tensor:
    return bucket[0][1] if len(bucket) == 1 else torch.cat([part for _, part in bucket])


def _buckets(entries: Iterable[tuple[Piece, Tensor]]) -> Iterator[list[tuple[Piece, Tensor]]]:
    """Consecutive ones together up to BUCKET_NUMBERS numbers; a larger one alone."""
    bucket: list[tuple[Piece, Tensor]] = []
    for entry in entries:
        if bucket and sum(piece.numel for piece, _ in bucket) + entry[0].numel > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(entry)
    if bucket:
        yield bucket
