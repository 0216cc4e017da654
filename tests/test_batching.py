from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from opd.batching import Plan, WorkItem, collate, plan
from opd.types import Advantage, Demonstration, Group, Prompt, Signal, TeacherHidden, Trajectory, no_routing


def trajectory(name: str, prompt_tokens: int, sampled_tokens: int, rng: np.random.Generator) -> Trajectory:
    length = prompt_tokens + sampled_tokens
    mask = np.arange(length) >= prompt_tokens
    return Trajectory(
        id=name,
        prompt_id=name.split("#")[0],
        domain="d",
        token_ids=rng.integers(2, 50, length).astype(np.int32),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, -rng.random(length), 0).astype(np.float32),
        version_spans=(),
        finish_reason="stop",
        routing=no_routing(length),
    )


def hidden_of(teacher: str, weight: float = 1.0) -> TeacherHidden:
    return TeacherHidden(teacher=teacher, weight=weight, hidden=None, head_hash="h", probe_positions=(), probe_lse=())


def make_step(
    seed: int, num_groups: int, group_size: int, teachers: int
) -> tuple[list[Group], list[list[Signal | tuple[TeacherHidden, ...]]]]:
    """Groups with random lengths; with teachers, every trajectory has a random non-empty set of them."""
    rng = np.random.default_rng(seed)
    groups, signals = [], []
    for g in range(num_groups):
        prompt = Prompt(id=f"d/train/{g}", domain="d", effort="none", token_ids=(0,), reference={})
        members = tuple(
            trajectory(f"{prompt.id}#{i}@0", int(rng.integers(1, 9)), int(rng.integers(1, 30)), rng)
            for i in range(group_size)
        )
        groups.append(Group(prompt=prompt, trajectories=members))
        row: list[Signal | tuple[TeacherHidden, ...]] = []
        for _ in members:
            chosen = [t for t in range(teachers) if rng.random() < 0.4] or [0]
            row.append(tuple(hidden_of(f"t{t}", 0.5) for t in chosen) if teachers else Advantage(value=1.0))
        signals.append(row)
    return groups, signals


def key(item: WorkItem) -> tuple[str, str | None]:
    return item.trajectory.id, item.teacher


def all_items(the_plan: Plan) -> list[WorkItem]:
    return [item for batches in the_plan.ranks for batch in batches for item in batch.items]


@pytest.mark.parametrize("seed", range(12))
def test_plan_places_every_item_once_within_all_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks, limit, teachers = int(rng.integers(1, 5)), int(rng.integers(20, 200)), int(rng.integers(0, 4))
    groups, signals = make_step(seed, int(rng.integers(1, 9)), int(rng.integers(1, 5)), teachers)
    result = plan(groups, signals, num_ranks=num_ranks, micro_batch_tokens=limit)

    expected: Counter[tuple[str, str | None]] = Counter()
    for group, row in zip(groups, signals, strict=True):
        for member, signal in zip(group.trajectories, row, strict=True):
            for part in signal if isinstance(signal, tuple) else (signal,):
                expected[(member.id, getattr(part, "teacher", None))] += 1
    assert Counter(map(key, all_items(result))) == expected
    assert set(expected.values()) == {1}
    assert result.num_rows == len(expected)
    assert result.num_loss_tokens == sum(t.num_loss_tokens for group in groups for t in group.trajectories)

    assert len(result.ranks) == num_ranks
    assert len({len(batches) for batches in result.ranks}) == 1
    for batches in result.ranks:
        met = [batch.teacher for batch in batches if batch.items]
        runs = [teacher for i, teacher in enumerate(met) if i == 0 or met[i - 1] != teacher]
        assert runs == sorted(set(met), key=str)  # each teacher once, in the same order on all ranks
        assert [bool(batch.items) for batch in batches] == sorted((bool(b.items) for b in batches), reverse=True)
        for batch in batches:
            assert len({(type(item.signal), item.teacher) for item in batch.items}) <= 1
            padded = len(batch.items) * max((len(item.trajectory.token_ids) for item in batch.items), default=0)
            assert padded <= limit or len(batch.items) == 1


def test_ranks_are_balanced_by_tokens() -> None:
    groups, signals = make_step(3, 40, 4, 3)
    result = plan(groups, signals, num_ranks=4, micro_batch_tokens=300)
    loads = [sum(len(item.trajectory.token_ids) for batch in b for item in batch.items) for b in result.ranks]
    longest = max(len(item.trajectory.token_ids) for item in all_items(result))
    assert max(loads) - min(loads) <= longest  # greedy on the least loaded rank


def test_padding_is_small_when_rows_are_sorted_by_length() -> None:
    groups, signals = make_step(5, 60, 2, 0)
    result = plan(groups, signals, num_ranks=1, micro_batch_tokens=200)
    real = sum(len(item.trajectory.token_ids) for item in all_items(result))
    padded = sum(
        len(batch.items) * max(len(item.trajectory.token_ids) for item in batch.items) for batch in result.ranks[0]
    )
    assert padded <= 1.15 * real


def test_plan_does_not_depend_on_the_order_of_arrival() -> None:
    groups, signals = make_step(1, 8, 3, 3)
    order = np.random.default_rng(0).permutation(len(groups))
    one = plan(groups, signals, num_ranks=3, micro_batch_tokens=90)
    other = plan([groups[i] for i in order], [signals[i] for i in order], num_ranks=3, micro_batch_tokens=90)
    assert [[list(map(key, b.items)) for b in rank] for rank in one.ranks] == [
        [list(map(key, b.items)) for b in rank] for rank in other.ranks
    ]


def test_more_ranks_than_items_gives_empty_micro_batches() -> None:
    groups, signals = make_step(2, 1, 1, 0)
    result = plan(groups, signals, num_ranks=3, micro_batch_tokens=100)
    assert [[len(batch.items) for batch in rank] for rank in result.ranks] == [[1], [0], [0]]


def test_plan_refuses_signals_that_do_not_fit() -> None:
    groups, signals = make_step(0, 2, 2, 0)
    with pytest.raises(ValueError, match="2 trajectories and 1 signals"):
        plan(groups, [signals[0], signals[1][:1]], num_ranks=1, micro_batch_tokens=100)
    with pytest.raises(ValueError, match="1 groups"):
        plan(groups, signals[:1], num_ranks=1, micro_batch_tokens=100)
    with pytest.raises(ValueError, match="empty tuple"):
        plan(groups, [signals[0], [(), Demonstration()]], num_ranks=1, micro_batch_tokens=100)
    with pytest.raises(ValueError, match="loss token"):
        plan([], [], num_ranks=1, micro_batch_tokens=100)
    with pytest.raises(ValueError, match="num_ranks=0"):
        plan(groups, signals, num_ranks=0, micro_batch_tokens=100)


@pytest.mark.parametrize("seed", range(4))
def test_collate_aligns_each_loss_token_with_the_state_before_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [trajectory(f"p{i}", int(rng.integers(1, 6)), int(rng.integers(0, 9)), rng) for i in range(5)]
    holes = dataclasses.replace(rows[0], loss_mask=rows[0].loss_mask & (np.arange(len(rows[0].loss_mask)) % 2 == 0))
    rows[0] = holes
    batch = collate(rows, pad_id=1)
    assert batch.token_ids.shape == (5, max(len(row.token_ids) for row in rows))
    flat = 0
    for index, row in enumerate(rows):
        end = len(row.token_ids)
        assert batch.lengths[index] == end
        assert batch.token_ids[index, :end].tolist() == row.token_ids.tolist()
        assert (batch.token_ids[index, end:] == 1).all()
        for t in np.flatnonzero(row.loss_mask):
            assert (batch.rows[flat], batch.positions[flat]) == (index, t - 1)
            assert batch.targets[flat] == row.token_ids[t]
            assert batch.sampler_logprobs[flat] == torch.tensor(row.sampler_logprobs[t])
            flat += 1
    assert flat == len(batch.rows) == len(batch.positions) == len(batch.targets) == len(batch.sampler_logprobs)


def test_collate_refuses_what_nothing_predicts() -> None:
    rng = np.random.default_rng(0)
    good = trajectory("good", 2, 3, rng)
    with pytest.raises(ValueError, match="bad has a loss token at index 0"):
        collate([good, dataclasses.replace(good, id="bad", loss_mask=np.ones(5, dtype=bool))], pad_id=0)
    with pytest.raises(ValueError, match=r"bad has .* \(5, 4, 5, 5\)"):
        collate([dataclasses.replace(good, id="bad", loss_mask=np.zeros(4, dtype=bool))], pad_id=0)
    with pytest.raises(ValueError, match="no trajectories"):
        collate([], pad_id=0)
