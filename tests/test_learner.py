from __future__ import annotations

import dataclasses
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from opd.batching import Plan, collate, plan
from opd.config import ConfigError, DistillConfig, GrpoConfig, LearnerConfig, ModelConfig, OptimizerConfig, StageConfig
from opd.learner import Learner, LearnerSettings, learning_rate_at
from opd.losses import logsumexp_at
from opd.model import load_model, new_v4
from opd.objective import Policy
from opd.stats import StepStats, merge_stats
from opd.types import (
    Advantage,
    Demonstration,
    Fp4Tensor,
    Group,
    Prompt,
    TeacherHead,
    TeacherHidden,
    Trajectory,
    no_routing,
)
from opd.weights import head_hash, named_weights, save_checkpoint

VOCAB = 64
TEACHER_WIDTH = 24

DENSE = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
# Rows shorter than 4 tokens complete no block of the CSA layer: its compressor then gets no gradient.
MOE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "q_lora_rank": 24,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "layer_types": ["sliding_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "moe"],
    "partial_rotary_factor": 0.5,
    "hc_mult": 2,
    "max_position_embeddings": 128,
}


class Memory:
    """A store in this process that hands out copies and knows which of them are still held."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.handed_out: list[tuple[int, weakref.ref[Tensor]]] = []

    def put(self, value: Tensor) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def get(self, handle: int) -> Tensor:
        value = self.values[handle].clone()
        self.handed_out.append((handle, weakref.ref(value)))
        return value


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(DENSE).save_pretrained(folder / "dense")
    moe = ModelConfig(config=MOE, fp4="none", max_tokens=128)
    save_checkpoint(folder / "moe", new_v4(moe, VOCAB, 0), None)
    return {
        "dense": ModelConfig(family="hf", path=str(folder / "dense"), fp4="none"),
        "moe": dataclasses.replace(moe, path=str(folder / "moe")),
    }


def settings_for(model: ModelConfig, stage: StageConfig, **learner: Any) -> LearnerSettings:
    optimizer = OptimizerConfig(name=learner.pop("optimizer", "adamw"), weight_decay=0.0, eps=1e-8)
    defaults: dict[str, Any] = {"micro_batch_tokens": 64, "grad_clip": 0.0, "optimizer": optimizer}
    return LearnerSettings(model=model, learner=LearnerConfig(**{**defaults, **learner}), stage=stage, total_steps=10)


SFT = StageConfig(learning_rate=1e-3, warmup_steps=0)
GRPO = GrpoConfig(learning_rate=1e-3, warmup_steps=0, kl_coefficient=0.3, clip=0.2, temperature=0.8)
DISTILL = DistillConfig(learning_rate=1e-3, warmup_steps=0, kl_temperature=1.3)


def make_groups(num: int, seed: int = 0, longest: int = 12) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num):
        members = []
        for i in range(2):
            prompt, length = int(rng.integers(1, 4)), int(rng.integers(1, longest))
            mask = np.arange(prompt + length) >= prompt
            members.append(
                Trajectory(
                    id=f"p{g}#{i}@0",
                    prompt_id=f"p{g}",
                    domain=("sums", "words")[g % 2],
                    token_ids=rng.integers(0, VOCAB, prompt + length).astype(np.int32),
                    loss_mask=mask,
                    sampler_logprobs=np.where(mask, -4.2 + 0.2 * rng.standard_normal(len(mask)), 0).astype(np.float32),
                    version_spans=(),
                    finish_reason="stop",
                    routing=no_routing(prompt + length),
                )
            )
        prompt = Prompt(id=f"p{g}", domain=members[0].domain, effort="none", token_ids=(0,), reference={})
        groups.append(Group(prompt=prompt, trajectories=tuple(members)))
    return groups


def advantages_of(groups: list[Group]) -> list[list[Advantage]]:
    return [[Advantage(value=1.0 + g), Advantage(value=-1.0 - g)] for g in range(len(groups))]


def signal_for(teacher: str, hidden: Tensor, head: Tensor, weight: float, store: Memory) -> TeacherHidden:
    probes = tuple(sorted({0, len(hidden) - 1}))
    return TeacherHidden(
        teacher=teacher,
        weight=weight,
        hidden=store.put(hidden),
        head_hash=head_hash(head),
        probe_positions=probes,
        probe_lse=tuple(logsumexp_at(hidden[list(probes)], head).tolist()),
    )


def head_for(teacher: str, head: Tensor, store: Memory) -> TeacherHead:
    return TeacherHead(teacher=teacher, weight=store.put(head), content_hash=head_hash(head), vocab_size=head.shape[0])


def make_teachers(
    groups: list[Group], store: Memory, names: tuple[str, ...] = ("ada", "bob", "cyd")
) -> tuple[list[list[tuple[TeacherHidden, ...]]], dict[str, TeacherHead]]:
    """Random teachers; the first trajectory of a group has two of them, at weights 0.7 and 0.3, the second has one."""
    generator = torch.Generator().manual_seed(7)
    heads = {name: torch.randn(VOCAB, TEACHER_WIDTH, generator=generator) for name in names}
    signals = []
    for g, group in enumerate(groups):
        row = []
        for i, trajectory in enumerate(group.trajectories):
            first, second = names[g % len(names)], names[(g + 1) % len(names)]
            chosen = {first: 0.7, second: 0.3} if i == 0 else {first: 1.0}
            hidden = {
                name: torch.randn(trajectory.num_loss_tokens, TEACHER_WIDTH, generator=generator).bfloat16().mul(0.4)
                for name in chosen
            }
            row.append(tuple(signal_for(n, hidden[n], heads[n], w, store) for n, w in chosen.items()))
        signals.append(row)
    return signals, {name: head_for(name, head, store) for name, head in heads.items()}


def plan_of(groups: list[Group], signals: Any, num_ranks: int = 1, micro_batch_tokens: int = 64) -> Plan:
    return plan(groups, signals, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)


def gradients_of(
    learner: Learner, the_plan: Plan, heads: dict[str, TeacherHead]
) -> tuple[dict[str, Tensor], StepStats]:
    """What the optimizer is about to apply, at ZeRO stage 0."""
    seen: dict[str, Tensor] = {}

    def spy(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None})

    handle = learner._engine._optimizer.register_step_pre_hook(spy)
    stats = learner.step(the_plan, heads)
    handle.remove()
    return seen, stats


def plain_loss(
    policy: Policy, reference: Policy, groups: list[Group], signals: Any, stage: StageConfig, store: Memory, heads: Any
) -> Tensor:
    """The step's loss from its definition: one unpadded trajectory after the other, dense logits."""
    num_loss_tokens = sum(t.num_loss_tokens for group in groups for t in group.trajectories)
    parts = []
    for group, row in zip(groups, signals, strict=True):
        for trajectory, signal in zip(group.trajectories, row, strict=True):
            ids = torch.as_tensor(trajectory.token_ids.astype(np.int64))
            where = torch.as_tensor(np.flatnonzero(trajectory.loss_mask))

            def logits_of(model: Policy, ids: Tensor = ids, where: Tensor = where) -> Tensor:
                hidden = model(ids[None], torch.tensor([len(ids)])).hidden[0]
                return hidden[where - 1] @ model.head.T

            def chosen(logprobs: Tensor, ids: Tensor = ids, where: Tensor = where) -> Tensor:
                return logprobs.gather(1, ids[where, None])[:, 0]

            logits = logits_of(policy)
            match stage:
                case DistillConfig(kl_temperature=tau):
                    for part in signal:
                        head = store.get(heads[part.teacher].weight).to(logits.dtype)
                        teacher = store.get(part.hidden).to(logits.dtype) @ head.T
                        p, q = (logits / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
                        parts.append(part.weight * (p.exp() * (p - q)).sum())
                case GrpoConfig(temperature=tau, clip=clip, kl_coefficient=beta):
                    logp = chosen((logits / tau).log_softmax(-1))
                    logref = chosen((logits_of(reference) / tau).log_softmax(-1)).detach()
                    logmu = torch.as_tensor(trajectory.sampler_logprobs)[where].to(logits.dtype)
                    ratio = (logp - logmu).exp()
                    surrogate = torch.minimum(ratio * signal.value, ratio.clamp(1 - clip, 1 + clip) * signal.value)
                    gap = logref - logp
                    parts.append((beta * ratio * (gap.exp() - gap - 1) - surrogate).sum())
                case _:
                    parts.append(-chosen(logits.log_softmax(-1)).sum())
    return torch.stack(parts).sum() / num_loss_tokens


@pytest.mark.parametrize("stage", [SFT, GRPO, DISTILL], ids=["sft", "grpo", "distill"])
def test_gradient_is_that_of_the_plain_definition(models: dict[str, ModelConfig], stage: StageConfig) -> None:
    store, groups = Memory(), make_groups(5)
    signals: Any = [[Demonstration()] * 2 for _ in groups]
    heads: dict[str, TeacherHead] = {}
    if isinstance(stage, GrpoConfig):
        signals = advantages_of(groups)
    elif isinstance(stage, DistillConfig):
        signals, heads = make_teachers(groups, store)
    learner = Learner(settings_for(models["dense"], stage, micro_batch_tokens=30), store)
    the_plan = plan_of(groups, signals, micro_batch_tokens=30)
    assert len(the_plan.ranks[0]) > 4
    learner.step(the_plan, heads)  # away from the reference, whose KL has no gradient at the start

    policy, reference = load_model(models["dense"]), load_model(models["dense"])
    for mine, theirs in zip(policy.parameters(), learner.model.parameters(), strict=True):
        mine.data.copy_(theirs)
    policy.double()
    reference.double()
    loss = plain_loss(policy, reference, groups, signals, stage, store, heads)
    loss.backward()
    gradients, stats = gradients_of(learner, the_plan, heads)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * norm


def test_balance_loss_is_a_mean_over_rows_and_moves_the_selection_bias(models: dict[str, ModelConfig]) -> None:
    groups = make_groups(4)
    signals = [[Demonstration()] * 2 for _ in groups]
    settings = settings_for(models["moe"], SFT, balance_loss=0.5, balance_bias_speed=0.01)
    learner = Learner(settings, Memory())
    model = load_model(models["moe"])
    rows = [torch.as_tensor(t.token_ids.astype(np.int64)) for group in groups for t in group.trajectories]
    outputs = [model(row[None], torch.tensor([len(row)])) for row in rows]
    balance = torch.stack([output.balance_loss for output in outputs]).mean()
    loss = plain_loss(model, model, groups, signals, SFT, Memory(), {})
    (loss + 0.5 * balance).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    gradients, stats = gradients_of(learner, plan_of(groups, signals, micro_batch_tokens=20), {})
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradients[name] - expected).norm() <= 1e-5 * norm
    load = torch.stack([output.expert_load for output in outputs]).sum(0)
    model.update_selection_bias(load, 0.01)
    for name, buffer in model.named_buffers():
        assert torch.equal(learner.model.get_buffer(name), buffer)
    assert stats.load_imbalance == pytest.approx((load.max() / load.float().mean()).item())


def assert_same_path(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Weights after a few steps of 1e-3 agree to a fifth of one.

    Muon's update and Adam's do not shrink with the gradient, so rounding is amplified where a gradient is nearly zero
    in some direction. It is exactly zero in theory for how the first layer mixes its residual streams, which are all
    equal there: those weights wander, without effect.
    """
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        if not name.startswith("model.layers.0.attn_hc."):
            assert (others[name] - weight).abs().max() < 2e-4, name


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in named_weights(learner.model).items()}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_micro_batches_change_only_rounding(models: dict[str, ModelConfig], kind: str) -> None:
    results = []
    for limit in (8, 40, 4000):
        store, groups = Memory(), make_groups(5)
        signals, heads = make_teachers(groups, store)
        learner = Learner(settings_for(models[kind], DISTILL, optimizer="muon", kl_tile_tokens=7), store)
        metrics = [merge_stats([learner.step(plan_of(groups, signals, 1, limit), heads)]) for _ in range(2)]
        results.append((metrics, weights_of(learner)))
    (first, weights), *others = results
    for metrics, other in others:
        for one, two in zip(first, metrics, strict=True):
            assert one.keys() == two.keys()
            assert all(two[key] == pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in one.items())
        assert_same_path(weights, other)


def test_each_head_is_loaded_once_and_alone(models: dict[str, ModelConfig]) -> None:
    store, groups = Memory(), make_groups(6)
    signals, heads = make_teachers(groups, store)
    learner = Learner(settings_for(models["dense"], DISTILL), store)
    handles = {head.weight: name for name, head in heads.items()}
    alive: list[int] = []
    get = store.get

    def counting(handle: int) -> Tensor:
        if handle in handles:
            alive.append(sum(reference() is not None for h, reference in store.handed_out if h in handles))
        return get(handle)

    store.get = counting
    stats = learner.step(plan_of(groups, signals, micro_batch_tokens=20), heads)
    assert stats.head_loads == 3
    assert [handles[h] for h, _ in store.handed_out if h in handles] == ["ada", "bob", "cyd"]
    assert alive == [0, 0, 0]
    assert merge_stats([stats])["distill/head_loads"] == 3


def forge(signals: Any, **changes: Any) -> Any:
    """The signals with the last one of teacher "ada" changed."""
    copied = [[list(parts) for parts in row] for row in signals]
    where = [(r, i, k) for r, row in enumerate(copied) for i, parts in enumerate(row) for k in range(len(parts))]
    r, i, k = [at for at in where if copied[at[0]][at[1]][at[2]].teacher == "ada"][-1]
    copied[r][i][k] = dataclasses.replace(copied[r][i][k], **changes)
    return [[tuple(parts) for parts in row] for row in copied]


def test_hidden_states_that_do_not_fit_their_head_are_refused(models: dict[str, ModelConfig]) -> None:
    store, groups = Memory(), make_groups(3)
    signals, heads = make_teachers(groups, store)
    other = torch.randn(VOCAB, TEACHER_WIDTH)
    num = groups[0].trajectories[1].num_loss_tokens
    swapped = dataclasses.replace(heads["ada"], weight=heads["bob"].weight)
    lying = dataclasses.replace(heads["ada"], weight=store.put(other), content_hash=head_hash(other))
    narrow = head_for("ada", torch.randn(VOCAB - 1, TEACHER_WIDTH), store)

    def claim(content_hash: str) -> Any:
        def changed(part: TeacherHidden) -> TeacherHidden:
            return dataclasses.replace(part, head_hash=content_hash) if part.teacher == "ada" else part

        return [[tuple(map(changed, parts)) for parts in row] for row in signals]

    first = signals[0][1][0]
    unnormed = store.put(store.get(first.hidden) * 1.5)
    cases: list[tuple[Any, dict[str, TeacherHead], str]] = [
        (forge(signals, head_hash="0" * 64), heads, r"ada: .* trajectory p\d#\d@0 belong to the output head 000"),
        (signals, heads | {"ada": lying}, "ada: .* belong to the output head"),
        (signals, heads | {"ada": swapped}, "head delivered for teacher ada has hash"),
        (claim(lying.content_hash), heads | {"ada": lying}, r"ada: .* trajectory p\d#\d@0 times its output head"),
        (claim(narrow.content_hash), heads | {"ada": narrow}, "ada has a vocabulary of 63"),
        (signals, {"bob": heads["bob"]}, "teacher ada, whose output head is not here"),
        ([[(dataclasses.replace(first, hidden=unnormed),)]], heads, r"p0#1@0 .* before the final norm"),
        ([[(dataclasses.replace(first, hidden=store.put(torch.zeros(num + 1, TEACHER_WIDTH))),)]], heads, "p0#1@0"),
    ]
    learner = Learner(settings_for(models["dense"], DISTILL), store)
    before = weights_of(learner)
    only = [Group(prompt=groups[0].prompt, trajectories=groups[0].trajectories[1:])]
    for case_signals, case_heads, message in cases:
        with pytest.raises(ValueError, match=message):
            learner.step(plan_of(groups if len(case_signals) > 1 else only, case_signals), case_heads)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_student_that_is_its_teacher_learns_exactly_nothing(models: dict[str, ModelConfig], kind: str) -> None:
    store, groups = Memory(), make_groups(3)
    learner = Learner(settings_for(models[kind], DISTILL, balance_loss=0.0, balance_bias_speed=0.0), store)
    model = load_model(models[kind])
    order = [item.trajectory for item in plan_of(groups, [[Demonstration()] * 2] * 3, 1, 4000).ranks[0][0].items]
    batch = collate(order, pad_id=0)
    with torch.no_grad():
        states = model(batch.token_ids, batch.lengths).hidden[batch.rows, batch.positions]
    head = model.head.detach()
    own = {t.id: signal_for("self", states[batch.rows == i], head, 1.0, store) for i, t in enumerate(order)}
    signals = [[(own[t.id],) for t in group.trajectories] for group in groups]
    before = weights_of(learner)
    stats = learner.step(plan_of(groups, signals, micro_batch_tokens=4000), {"self": head_for("self", head, store)})
    assert (stats.loss, stats.grad_norm) == (0.0, 0.0)
    assert merge_stats([stats])["distill/top1_agreement/sums"] == 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())


@pytest.mark.parametrize(
    ("kind", "optimizer", "stage"), [("moe", "muon", 0), ("moe", "adamw", 1), ("dense", "adamw", 2)]
)
def test_a_restored_learner_goes_on_bitwise(
    models: dict[str, ModelConfig], tmp_path: Path, kind: str, optimizer: str, stage: int
) -> None:
    store, groups = Memory(), make_groups(4)
    signals, heads = make_teachers(groups, store)
    schedule = dataclasses.replace(DISTILL, warmup_steps=5)
    settings = settings_for(models[kind], schedule, optimizer=optimizer, zero_stage=stage, grad_clip=0.1)
    learner, the_plan = Learner(settings, store), plan_of(groups, signals)
    for _ in range(2):
        learner.step(the_plan, heads)
    learner.save(tmp_path / "step_2")
    expected = [learner.step(the_plan, heads) for _ in range(2)]
    learner.finish_saving()

    resumed = Learner(settings, store)
    resumed.load(tmp_path / "step_2")
    for stats in expected:
        again = resumed.step(the_plan, heads)
        assert dataclasses.replace(again, seconds=0.0) == dataclasses.replace(stats, seconds=0.0)
    one, two = weights_of(learner), weights_of(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))

    other = "adamw" if optimizer == "muon" else "muon"
    stranger = Learner(settings_for(models[kind], schedule, optimizer=other), store)
    with pytest.raises(ConfigError, match=f"optimizer.name={optimizer}"):
        stranger.load(tmp_path / "step_2")
    with pytest.raises(ConfigError, match="does not exist"):
        stranger.load(tmp_path / "step_3")


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_named(models: dict[str, ModelConfig], zero_stage: int) -> None:
    groups = make_groups(3)
    good, bad = advantages_of(groups), advantages_of(groups)
    bad[1][0] = Advantage(value=math.inf)
    learner = Learner(settings_for(models["moe"], GRPO, zero_stage=zero_stage), Memory())
    clean = Learner(settings_for(models["moe"], GRPO, zero_stage=zero_stage), Memory())
    before = weights_of(learner)
    stats = learner.step(plan_of(groups, bad, micro_batch_tokens=20), {})
    assert len(stats.skipped) == 1
    assert "p1#0@0" in stats.skipped[0]
    assert not math.isfinite(stats.grad_norm)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(learner).items())
    assert merge_stats([stats])["train/skipped_steps"] == 1

    after = learner.step(plan_of(groups, good, micro_batch_tokens=20), {})
    assert not after.skipped and after.num_skipped_steps == 1
    expected = clean.step(plan_of(groups, good, micro_batch_tokens=20), {})
    assert after.grad_norm == expected.grad_norm  # nothing of the skipped step is left
    one, two = weights_of(learner), weights_of(clean)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradient_is_clipped_before_the_optimizer(models: dict[str, ModelConfig]) -> None:
    groups = make_groups(3)
    signals = [[Demonstration()] * 2 for _ in groups]
    learner = Learner(settings_for(models["dense"], SFT, grad_clip=0.01, optimizer="muon"), Memory())
    gradients, stats = gradients_of(learner, plan_of(groups, signals), {})
    assert stats.grad_norm > 0.1
    assert torch.nn.utils.get_total_norm(list(gradients.values())).item() == pytest.approx(0.01, rel=1e-3)


def test_snapshot_packs_the_experts_the_model_rounds(models: dict[str, ModelConfig]) -> None:
    learner = Learner(settings_for(dataclasses.replace(models["moe"], fp4="experts"), SFT), Memory())
    snapshot = learner.snapshot(policy_version=3)
    assert snapshot.policy_version == 3
    packed = {name for name, tensor in snapshot.tensors.items() if isinstance(tensor, Fp4Tensor)}
    leaves = ("gate_up_proj", "down_proj")
    assert packed == {f"model.layers.{layer}.mlp.experts.{leaf}" for layer in range(2) for leaf in leaves}


def test_settings_that_cannot_work_are_refused(models: dict[str, ModelConfig]) -> None:
    with pytest.raises(ConfigError, match=r"learner\.zero_stage=3 .* learner\.optimizer\.name=muon"):
        Learner(settings_for(models["dense"], SFT, optimizer="muon", zero_stage=3), Memory())
    with pytest.raises(ConfigError, match=r"learner\.offload_optimizer=true .* learner\.zero_stage=0"):
        Learner(settings_for(models["dense"], SFT, offload_optimizer=True), Memory())
    with pytest.raises(ConfigError, match=r"stages\.grpo\.temperature=0"):
        Learner(settings_for(models["dense"], dataclasses.replace(GRPO, temperature=0.0)), Memory())
    with pytest.raises(ValueError, match="rank 0 of 1"):
        Learner(dataclasses.replace(settings_for(models["dense"], SFT), rank=1, world_size=2), Memory())


def test_learning_rate_rises_stays_and_falls() -> None:
    stage = StageConfig(learning_rate=2.0, warmup_steps=4, decay_fraction=0.3)
    rates = [learning_rate_at(step, stage, 20) for step in range(20)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4:14] == [2.0] * 10
    assert rates[-1] == pytest.approx(0.2)
    rises, falls = np.diff(rates[:5]), np.diff(rates[13:])
    assert np.allclose(rises, 0.45) and np.allclose(falls, -0.3)
    flat = StageConfig(learning_rate=2.0, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate_at(step, flat, 5) for step in range(5)} == {2.0}
