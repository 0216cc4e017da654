"""Who trains on what, in which order, and the tensors of one micro-batch. Pure functions.

`plan` turns a step's trajectories and signals into the same number of micro-batches for every rank, such that a rank
meets each teacher once (V4 report 5.2.2: at most one teacher head on the device, loaded once per step). Reordering
inside a step changes only rounding, because every loss is a sum over tokens divided by a count of the whole step.
`collate` pads one micro-batch and holds the one shift of the project: token t is predicted by the state at t - 1.

Left out: what a signal means (`opd.learner`) and where hidden states lie (`Store`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.types import Group, Signal, TeacherHidden, TeacherLogprobs, Trajectory, no_routing


@dataclass(slots=True, kw_only=True, frozen=True)
class WorkItem:
    """One row of a micro-batch: a trajectory and one signal. A trajectory with several teachers is several items."""

    trajectory: Trajectory
    signal: Signal

    @property
    def teacher(self) -> str | None:
        return self.signal.teacher if isinstance(self.signal, TeacherHidden | TeacherLogprobs) else None

    @property
    def weight(self) -> float:
        """Of its token losses: a teacher's w_i, else 1."""
        return self.signal.weight if isinstance(self.signal, TeacherHidden | TeacherLogprobs) else 1.0


@dataclass(slots=True, kw_only=True, frozen=True)
class MicroBatch:
    """Rows of one forward and backward: one type of signal and, in distillation, one teacher. May be empty."""

    items: tuple[WorkItem, ...]

    @property
    def teacher(self) -> str | None:
        return self.items[0].teacher if self.items else None


@dataclass(slots=True, kw_only=True, frozen=True)
class Plan:
    """One optimizer step.

    The loss of the step is the sum over all items of weight * token losses, divided by `num_loss_tokens`, which counts
    each trajectory's loss tokens once however many teachers it has. So the weights of a mixture are the w_i of the
    objective, and a teacher more is not a smaller learning rate.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]  # equally many micro-batches per rank
    num_loss_tokens: int  # of all trajectories of the step, each counted once
    num_rows: int  # items of all ranks


def plan(
    groups: Sequence[Group],
    signals: Sequence[Sequence[Signal | tuple[TeacherHidden | TeacherLogprobs, ...]]],
    *,
    num_ranks: int,
    micro_batch_tokens: int,
) -> Plan:
    """Spreads a step over ranks and cuts it into micro-batches; the same input gives the same plan.

    `signals[g][i]` is the signal of `groups[g].trajectories[i]`: a tuple with the signal of each teacher, or one
    signal. Every rank gets items in order of teacher name, long rows first, and its share of the tokens is balanced
    greedily. Rows times longest row of a micro-batch is at most `micro_batch_tokens`, except for a single longer row.
    Ranks with fewer micro-batches get empty ones at the end. Raises ValueError if signals do not match trajectories,
    and for a step without a loss token.
    """
    if num_ranks < 1 or micro_batch_tokens < 1:
        raise ValueError(f"num_ranks={num_ranks} and micro_batch_tokens={micro_batch_tokens} must be at least 1")
    items: list[WorkItem] = []
    num_loss_tokens = 0
    if len(groups) != len(signals):
        raise ValueError(f"signals are given for {len(signals)} groups, and there are {len(groups)}")
    for group, group_signals in zip(groups, signals, strict=True):
        if len(group.trajectories) != len(group_signals):
            raise ValueError(
                f"prompt {group.prompt.id} has {len(group.trajectories)} trajectories and {len(group_signals)} signals"
            )
        for trajectory, signal in zip(group.trajectories, group_signals, strict=True):
            parts = signal if isinstance(signal, tuple) else (signal,)
            if not parts:
                raise ValueError(f"trajectory {trajectory.id} has an empty tuple of signals; it needs at least one")
            items.extend(WorkItem(trajectory=trajectory, signal=part) for part in parts)
            num_loss_tokens += trajectory.num_loss_tokens
    if num_loss_tokens == 0:
        raise ValueError(f"none of the {len(items)} trajectories of this step has a loss token")

    items.sort(key=lambda item: (*_kind(item), -len(item.trajectory.token_ids), item.trajectory.id))
    shares: list[list[WorkItem]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for item in items:
        rank = min(range(num_ranks), key=lambda r: load[r])
        shares[rank].append(item)
        load[rank] += len(item.trajectory.token_ids)
    ranks = [_cut(share, micro_batch_tokens) for share in shares]
    most = max(len(batches) for batches in ranks)
    return Plan(
        ranks=tuple((*batches, *[MicroBatch(items=())] * (most - len(batches))) for batches in ranks),
        num_loss_tokens=num_loss_tokens,
        num_rows=len(items),
    )


def _kind(item: WorkItem) -> tuple[str, str]:
    """What the rows of a micro-batch have in common."""
    return (item.teacher or "", type(item.signal).__name__)


def _cut(share: list[WorkItem], micro_batch_tokens: int) -> list[MicroBatch]:
    """`share` is sorted by kind, then longest first, so the first row of a micro-batch is its longest."""
    batches: list[list[WorkItem]] = []
    for item in share:
        if batches:
            current = batches[-1]
            padded = (len(current) + 1) * len(current[0].trajectory.token_ids)
            if _kind(current[0]) == _kind(item) and padded <= micro_batch_tokens:
                current.append(item)
                continue
        batches.append([item])
    return [MicroBatch(items=tuple(batch)) for batch in batches]


@dataclass(slots=True, kw_only=True, frozen=True)
class Batch:
    """Padded rows, and a flat list of their N loss tokens: row by row, in order of position.

    Example, the trajectory of `Trajectory`'s docstring as row 0: lengths [5], rows [0, 0, 0], positions [1, 2, 3],
    targets [7, 8, 1], sampler_logprobs [-.1, -.93, -.02].
    """

    token_ids: Tensor  # int64 [B, T], padded on the right
    lengths: Tensor  # int64 [B]
    rows: Tensor  # int64 [N]: row of a loss token, which is the index of its trajectory
    positions: Tensor  # int64 [N]: of the state that predicts it, one before its own
    targets: Tensor  # int64 [N]
    sampler_logprobs: Tensor  # float32 [N], before truncation
    routing: Tensor  # int16 [B, T, L, K], the trajectories' own, -1 in padding; L = 0 where nothing was recorded

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: getattr(self, name).to(device) for name in self.__slots__})


def collate(trajectories: Sequence[Trajectory], pad_id: int) -> Batch:
    """Pads trajectories on the right with `pad_id`.

    Raises ValueError for no trajectories, for a loss token at index 0 (nothing predicts it), for a trajectory
    whose arrays differ in length, and for routing of different layers or numbers of experts.
    """
    if not trajectories:
        raise ValueError("there are no trajectories to collate")
    for trajectory in trajectories:
        arrays = (trajectory.token_ids, trajectory.loss_mask, trajectory.sampler_logprobs, trajectory.routing)
        sizes = tuple(map(len, arrays))
        if len(set(sizes)) != 1 or sizes[0] == 0:
            raise ValueError(
                f"trajectory {trajectory.id} has token_ids, loss_mask, sampler_logprobs and routing of lengths "
                f"{sizes}; they must be equal and at least 1"
            )
        if trajectory.loss_mask[0]:
            raise ValueError(f"trajectory {trajectory.id} has a loss token at index 0, which no state predicts")
    if len(recorded := {trajectory.routing.shape[1:] for trajectory in trajectories}) != 1:
        raise ValueError(f"routing of one micro-batch must be of one shape; per token it is of {sorted(recorded)}")
    lengths = torch.tensor([len(trajectory.token_ids) for trajectory in trajectories])
    shape = (len(trajectories), int(lengths.max()))
    token_ids = torch.full(shape, pad_id, dtype=torch.int64)
    sampler_logprobs = torch.zeros(shape, dtype=torch.float32)
    counts = torch.zeros(shape, dtype=torch.bool)
    routing = torch.full((*shape, *recorded.pop()), -1, dtype=torch.int16)
    for row, trajectory in enumerate(trajectories):
        end = len(trajectory.token_ids)
        token_ids[row, :end] = torch.as_tensor(trajectory.token_ids.astype("int64"))
        sampler_logprobs[row, :end] = torch.as_tensor(trajectory.untruncated_sampler_logprobs.astype("float32"))
        counts[row, :end] = torch.as_tensor(trajectory.loss_mask.astype("bool"))
        routing[row, :end] = torch.as_tensor(trajectory.routing.astype("int16"))
    rows, columns = counts.nonzero(as_tuple=True)
    return Batch(
        token_ids=token_ids,
        lengths=lengths,
        rows=rows,
        positions=columns - 1,
        targets=token_ids[rows, columns],
        sampler_logprobs=sampler_logprobs[rows, columns],
        routing=routing,
    )


def collate_tokens(sequences: Sequence[Sequence[int]]) -> Batch:
    """Plain token sequences of which every token but the first counts, as if each were a trajectory's."""
    trajectories = [
        Trajectory(
            id=str(index),
            prompt_id=str(index),
            domain="",
            token_ids=np.asarray(sequence, np.int32),
            loss_mask=np.arange(len(sequence)) > 0,
            sampler_logprobs=np.zeros(len(sequence), np.float32),
            version_spans=(),
            finish_reason="stop",
            routing=no_routing(len(sequence)),
        )
        for index, sequence in enumerate(sequences)
    ]
    return collate(trajectories, pad_id=0)
