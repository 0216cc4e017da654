"""Planted mistakes: each is refused or skipped, with what one needs to find it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd.batching import MicroBatch, collate
from opd.config import ModelConfig
from opd.health import Health, Levels
from opd.learner import Learner, merge_stats
from opd.model import new_v4
from opd.stats import StepStats
from opd.types import Advantage, Demonstration, Group, VersionSpan
from opd.weights import save_checkpoint
from tests.test_learner import (
    DISTILL,
    GRPO,
    MOE,
    SFT,
    VOCAB,
    Memory,
    advantages_of,
    make_groups,
    make_teachers,
    plan_of,
    settings_for,
    weights_of,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(config=MOE, fp4="none", max_tokens=128)
    save_checkpoint(folder / "moe", new_v4(config, VOCAB, 0), None)
    return dataclasses.replace(config, path=str(folder / "moe"))


def demonstrations(groups: list[Group]) -> Any:
    return [[Demonstration()] * 2 for _ in groups]


def test_a_plan_that_divides_by_a_wrong_count_is_refused(model: ModelConfig) -> None:
    learner, groups = Learner(settings_for(model, SFT), Memory()), make_groups(3)
    before = weights_of(learner)
    right = plan_of(groups, demonstrations(groups))
    ((*batches,),) = right.ranks
    uneven = (tuple(batches), (*batches, MicroBatch(items=())))
    for wrong, message in (
        (dataclasses.replace(right, num_loss_tokens=right.num_loss_tokens + 1), "num_loss_tokens=.* have"),
        (dataclasses.replace(right, num_rows=right.num_rows - 1), "num_rows="),
        (dataclasses.replace(right, ranks=(tuple(batches[:-1]),)), "num_loss_tokens="),
        (dataclasses.replace(right, ranks=uneven, num_rows=2 * right.num_rows), "equally many micro-batches"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.step(wrong, {})
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())
    learner.step(right, {})
    store = Memory()
    signals, heads = make_teachers(groups, store)  # a trajectory of two teachers is two rows, and counted once
    Learner(settings_for(model, DISTILL), store).step(plan_of(groups, signals), heads)


def test_tokens_of_weights_too_old_or_not_there_yet_are_refused(model: ModelConfig) -> None:
    stage = dataclasses.replace(GRPO, max_staleness=2)
    learner, groups = Learner(settings_for(model, stage), Memory()), make_groups(2)

    def sampled_by(*versions: int) -> Any:
        spans = tuple(VersionSpan(start=1 + i, policy_version=version) for i, version in enumerate(versions))
        first, *others = groups[0].trajectories
        trajectories = (dataclasses.replace(first, version_spans=spans), *others)
        marked = [dataclasses.replace(groups[0], trajectories=trajectories), groups[1]]
        return plan_of(marked, advantages_of(marked))

    learner.step(sampled_by(99), {})  # nothing was published: there is nothing to compare with
    learner.publish(7)
    for versions in ((7,), (5,), (5, 6, 7)):
        learner.step(sampled_by(*versions), {})
    for versions in ((4,), (7, 4), (8,)):
        with pytest.raises(ValueError, match=r"p0#0@0 has tokens of policy version (4|8); .* learn from 5 to 7"):
            learner.step(sampled_by(*versions), {})


def test_what_is_not_finite_is_written_out_and_ends_the_run_at_last(model: ModelConfig, tmp_path: Path) -> None:
    settings = settings_for(model, GRPO, max_skipped_steps=3)
    learner, groups = Learner(dataclasses.replace(settings, dump_dir=str(tmp_path)), Memory()), make_groups(3)
    good, bad = advantages_of(groups), advantages_of(groups)
    bad[1][0] = Advantage(value=math.inf)
    before = weights_of(learner)
    learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    learner.step(plan_of(groups, good), {})  # counting begins again
    learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    with pytest.raises(RuntimeError, match=rf"3 steps in a row .*max_skipped_steps=3.*p1#0@0.*{tmp_path}"):
        learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())

    written = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert written == [f"step_{step}_rank_0_{index}" for index, step in enumerate((0, 1, 3, 4, 5))]
    about = json.loads((tmp_path / f"{written[0]}.json").read_text())
    assert (about["step"], about["rank"], about["signal"]) == (0, 0, "Advantage")
    assert "p1#0@0" in about["reason"]
    names = [row["id"] for row in about["trajectories"]]
    rows = [t for name in names for group in groups for t in group.trajectories if t.id == name]
    tensors, batch = load_file(tmp_path / f"{written[0]}.safetensors"), collate(rows, pad_id=0)
    assert torch.equal(tensors["token_ids"], batch.token_ids) and torch.equal(tensors["targets"], batch.targets)
    assert torch.isinf(tensors["advantages"]).any()
    assert tensors["weights"].shape == tensors["reference_logprobs"].shape == batch.targets.shape


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_leaves_all_its_rows(model: ModelConfig, tmp_path: Path, zero_stage: int) -> None:
    settings = settings_for(model, SFT, optimizer="muon", zero_stage=zero_stage)
    learner, groups = Learner(dataclasses.replace(settings, dump_dir=str(tmp_path)), Memory()), make_groups(2)
    before = weights_of(learner)
    handle = learner.model.head.register_hook(lambda gradient: gradient * math.nan)
    stats = learner.step(plan_of(groups, demonstrations(groups), micro_batch_tokens=20), {})
    handle.remove()
    assert stats.skipped == ("the gradient's norm is nan",) and math.isfinite(stats.loss)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())
    written = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {row["id"] for about in written for row in about["trajectories"]} == {
        trajectory.id for group in groups for trajectory in group.trajectories
    }
    assert not learner.step(plan_of(groups, demonstrations(groups)), {}).skipped


def distance(one: Learner, other: Learner) -> float:
    theirs = weights_of(other)
    return math.sqrt(sum((weight - theirs[name]).square().sum().item() for name, weight in weights_of(one).items()))


@pytest.mark.parametrize(("optimizer", "zero_stage"), [("adamw", 0), ("adamw", 1), ("muon", 0), ("muon", 2)])
def test_a_gradient_that_explodes_is_clipped_told_and_when_it_overflows_skipped(
    model: ModelConfig, optimizer: str, zero_stage: int
) -> None:
    """The plant multiplies the gradient by a factor in one step: the weights move no further than they would have."""
    groups, health = make_groups(3), Health()

    def learner_after(factors: list[float]) -> tuple[Learner, list[StepStats]]:
        settings = settings_for(model, SFT, optimizer=optimizer, zero_stage=zero_stage, grad_clip=1e-3)
        learner, factor = Learner(settings, Memory()), 1.0
        stats: list[StepStats] = []
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * factor)
        for factor in factors:  # noqa: B007  the hooks read it
            stats.append(learner.step(plan_of(groups, demonstrations(groups)), {}))
        return learner, stats

    calm = [1.0] * (Levels().window // 2)
    learner, stats = learner_after([*calm, 1e6])
    clipped, _ = learner_after([*calm, 1.0])
    assert stats[-1].grad_norm > 1e5 * stats[-2].grad_norm and not stats[-1].skipped
    before, _ = learner_after(calm)
    assert distance(learner, clipped) < 0.01 * distance(clipped, before)
    told = [{finding.rule for finding in health.check(step, merge_stats([s]))} for step, s in enumerate(stats)]
    assert [("grad_norm_spike" in rules) for rules in told] == [False] * len(calm) + [True]

    learner, stats = learner_after([*calm, math.inf])
    (why,) = stats[-1].skipped
    assert why in ("the gradient's norm is nan", "the gradient's norm is inf")
    assert distance(learner, before) == 0
