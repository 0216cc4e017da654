"""Every loss by its name, from hidden states and from log-probabilities, against the dense float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd.batching import Batch
from opd.config import (
    FULL_LOSSES,
    SAMPLED_LOSSES,
    TOPK_LOSSES,
    CorrectionConfig,
    DistillConfig,
    GrpoConfig,
    ModelConfig,
)
from opd.correction import correct
from opd.distillation import Distill, Distilled, DistillLogprobs, _overlap, distill
from opd.learner import Learner
from opd.logits import TileSizes
from opd.metrics import describe
from opd.stats import merge_stats
from opd.types import Advantage
from tests import oracles
from tests.test_divergence import random_inputs, relative
from tests.test_learner import Memory, advantages_of, make_groups, make_teachers, plan_of, settings_for
from tests.test_learner import models as models  # a fixture

NUM, VOCAB, TOP = 11, 37, 5
TILES = TileSizes(tile_tokens=4, tile_vocab=10)
ROWS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
ALL = (*FULL_LOSSES, *TOPK_LOSSES, *SAMPLED_LOSSES)


class Case:
    """Student, teacher and batch of one micro-batch in float64."""

    def __init__(self, temperature: float = 1.0) -> None:
        self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.targets = random_inputs(
            NUM, VOCAB, 5, 9, torch.float64
        )
        self.log_p = (self.hidden @ self.head.T / temperature).log_softmax(-1)
        self.log_q = (self.teacher_hidden @ self.teacher_head.T / temperature).log_softmax(-1)
        likeliest = self.log_q.topk(TOP).indices
        self.targets[::3] = likeliest[::3, 1]  # some inside the top k, most outside
        self.weights = torch.linspace(0.2, 1.5, NUM, dtype=torch.float64) / NUM
        noise = 0.3 * torch.randn(NUM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.policy_logprobs = self.log_p.detach()[torch.arange(NUM), self.targets]
        zeros = torch.zeros(NUM, dtype=torch.int64)
        self.batch = Batch(
            token_ids=zeros[:3, None],
            lengths=zeros[:3],
            rows=ROWS,
            positions=zeros,
            targets=self.targets,
            sampler_logprobs=self.policy_logprobs - noise,
            routing=torch.empty(3, 1, 0, 0, dtype=torch.int16),
        )
        self.states = Distill(hidden=self.teacher_hidden, head=self.teacher_head)
        self.logprobs = DistillLogprobs(
            logprobs=self.log_q[torch.arange(NUM), self.targets],
            top_ids=self.log_q.topk(TOP + 2).indices,
            top_logprobs=self.log_q.topk(TOP + 2).values,
        )

    def run(self, stage: DistillConfig, remote: bool = False, reference: Distill | None = None) -> Distilled:
        task = self.logprobs if remote else self.states
        return distill(stage, task, self.hidden, self.head, self.batch, self.weights, TILES, reference)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        one, two = torch.autograd.grad(loss, (self.hidden, self.head), retain_graph=True)
        return one, two


def stage_of(loss: str, **options: object) -> DistillConfig:
    return DistillConfig(loss=loss, top_k=TOP, mix=0.3, beta=0.4, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loss", ALL)
def test_every_loss_from_hidden_states(loss: str) -> None:
    case = Case(temperature=1.3)
    result = case.run(stage_of(loss, temperature=1.3, kl_temperature=1.3))
    expected = oracles.dense_losses(case.log_p, case.log_q, case.targets, TOP, 0.3, 0.4)
    dense = (case.weights * expected[loss]).sum()
    for actual, wanted in zip(case.gradients(result.loss), case.gradients(dense), strict=True):
        assert relative(actual, wanted) <= 1e-11
    if not loss.endswith("sampled_reverse_kl"):  # whose value is the estimate, and not what is differentiated
        assert result.loss.item() == pytest.approx(dense.item(), rel=1e-11)
    # Whatever is minimised, the exact reverse KL is measured, and the sampler's log-probs are found.
    torch.testing.assert_close(result.per_token["distill/reverse_kl"], expected["reverse_kl"].detach())
    torch.testing.assert_close(result.logprobs, case.policy_logprobs)
    assert not any(value.requires_grad for value in (result.logprobs, *result.per_token.values()))
    assert ("distill/topk_teacher_mass" in result.per_token) == (loss in TOPK_LOSSES)
    if loss in TOPK_LOSSES:
        inside = case.log_q.topk(TOP).indices
        for side, logs in (("student", case.log_p.detach()), ("teacher", case.log_q)):
            mass = logs.gather(1, inside).exp().sum(-1)
            torch.testing.assert_close(result.per_token[f"distill/topk_{side}_mass"], mass)


@pytest.mark.parametrize("loss", [*TOPK_LOSSES, *SAMPLED_LOSSES])
def test_log_probabilities_give_what_hidden_states_give(loss: str) -> None:
    case = Case()
    ours, theirs = case.run(stage_of(loss)), case.run(stage_of(loss), remote=True)
    assert theirs.loss.item() == pytest.approx(ours.loss.item(), rel=1e-12)
    for one, two in zip(case.gradients(ours.loss), case.gradients(theirs.loss), strict=True):
        assert relative(two, one) <= 1e-12
    torch.testing.assert_close(theirs.logprobs, ours.logprobs)
    sampled = (case.log_p.detach() - case.log_q)[torch.arange(NUM), case.targets]
    torch.testing.assert_close(theirs.per_token["distill/reverse_kl"], sampled)


def test_the_overlap_is_of_the_sixteen_likeliest_of_both() -> None:
    case = Case()
    found = case.run(stage_of("reverse_kl")).per_token["distill/top16_overlap"]
    mine, theirs = case.log_p.topk(16).indices.tolist(), case.log_q.topk(16).indices.tolist()
    expected = [len(set(one) & set(two)) / 16 for one, two in zip(mine, theirs, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert 0 < found.mean() < 1
    many = torch.arange(200) % NUM  # of more than 64 tokens every third is looked at, and stands for its neighbours
    states = Distill(hidden=case.teacher_hidden[many], head=case.teacher_head)
    spread = _overlap(states, case.hidden[many], case.head, TILES)
    first = [min(at for at in range(200) if at * 64 // 200 == index * 64 // 200) for index in range(200)]
    torch.testing.assert_close(spread, torch.tensor(expected)[many[first]])
    own = Distill(hidden=case.hidden.detach(), head=case.head.detach())
    assert _overlap(own, case.hidden, case.head, TILES).tolist() == [1.0] * NUM
    assert _overlap(own, case.hidden[:0], case.head, TILES).shape == (0,)


def test_log_probabilities_are_not_enough_for_the_others() -> None:
    case = Case()
    for loss in FULL_LOSSES:
        with pytest.raises(ValueError, match=f"loss={loss} needs a teacher's hidden states"):
            case.run(stage_of(loss), remote=True)
    case.logprobs.top_ids, case.logprobs.top_logprobs = case.logprobs.top_ids[:, :2], case.logprobs.top_logprobs[:, :2]
    with pytest.raises(ValueError, match=r"needs top_k=5 log-probabilities of a teacher at every token; it sent 2"):
        case.run(stage_of("topk_reverse_kl"), remote=True)


def test_advantage_clip_and_baseline() -> None:
    case = Case()
    at = torch.arange(NUM), case.targets
    gap = (case.log_q - case.log_p.detach())[at]
    kl = (case.log_p.exp() * (case.log_p - case.log_q)).sum(-1).detach()
    clipped = case.run(stage_of("sampled_reverse_kl", advantage_clip=1.0))
    share = clipped.per_token["distill/advantage_clip_share"]
    assert torch.equal(share, gap.abs() > 1.0)
    assert 0 < int(share.sum()) < NUM
    for result, advantage in (
        (clipped, gap.clamp(-1, 1)),
        (case.run(stage_of("sampled_reverse_kl", baseline="kl")), gap + kl),
    ):
        dense = -(case.weights * advantage * case.log_p[at]).sum()
        for actual, wanted in zip(case.gradients(result.loss), case.gradients(dense), strict=True):
            assert relative(actual, wanted) <= 1e-11


def test_masked_ids_do_not_count() -> None:
    case = Case()
    ids = sorted({int(case.targets[0]), int(case.targets[4])})
    for loss in ("reverse_kl", "topk_sampled_reverse_kl", "sampled_reverse_kl_k2"):
        result = case.run(stage_of(loss, masked_ids=ids))
        is_masked = torch.isin(case.targets, torch.tensor(ids))
        assert torch.equal(result.per_token["distill/special_share"], is_masked)
        expected = oracles.dense_losses(case.log_p, case.log_q, case.targets, TOP, 0.3, 0.4)[loss]
        dense = (case.weights * ~is_masked * expected).sum()
        for actual, wanted in zip(case.gradients(result.loss), case.gradients(dense), strict=True):
            assert relative(actual, wanted) <= 1e-11


@pytest.mark.parametrize("loss", ["reverse_kl", "topk_sampled_reverse_kl", "sampled_reverse_kl_k2"])
def test_corrections_reach_what_they_correct(loss: str) -> None:
    """Masks any loss; importance weights only what is an expectation over the sampled token."""
    case = Case()
    correction = CorrectionConfig(max_mean_gap=0.1)
    if loss != "reverse_kl":
        correction.ratio, correction.high = "tis", 1.1
    corrected = correct(correction, case.policy_logprobs, case.batch.sampler_logprobs, ROWS)
    assert 0 < int(corrected.mask.sum()) < NUM
    result = case.run(stage_of(loss, correction=correction))
    assert torch.equal(result.per_token["distill/geometric_share"], corrected.mask == 0)
    expected = oracles.dense_losses(case.log_p, case.log_q, case.targets, TOP, 0.3, 0.4)[loss]
    weights = case.weights * corrected.mask
    if loss == "topk_sampled_reverse_kl":  # the exact part is as it was
        inside = case.log_q.topk(TOP).indices
        own = (case.log_p.gather(1, inside).exp() * (case.log_p - case.log_q).detach().gather(1, inside)).sum(-1)
        expected = own + corrected.importance * (expected - own)
    elif loss == "sampled_reverse_kl_k2":
        expected = corrected.importance * expected
    dense = (weights * expected).sum()
    for actual, wanted in zip(case.gradients(result.loss), case.gradients(dense), strict=True):
        assert relative(actual, wanted) <= 1e-11


def test_the_reference_pulls_back_exactly() -> None:
    case = Case()
    generator = torch.Generator().manual_seed(11)
    reference = Distill(
        hidden=torch.randn(NUM, 5, generator=generator, dtype=torch.float64),
        head=torch.randn(VOCAB, 5, generator=generator, dtype=torch.float64),
    )
    log_r = (reference.hidden @ reference.head.T).log_softmax(-1)
    kl, back = ((case.log_p.exp() * (case.log_p - log)).sum(-1) for log in (case.log_q, log_r))
    result = case.run(stage_of("reverse_kl", reference_kl=0.3), reference=reference)
    dense = (case.weights * (kl + 0.3 * back)).sum()
    assert result.loss.item() == pytest.approx(dense.item(), rel=1e-12)
    torch.testing.assert_close(result.per_token["distill/kl_to_reference"], back.detach())
    for actual, wanted in zip(case.gradients(result.loss), case.gradients(dense), strict=True):
        assert relative(actual, wanted) <= 1e-11


def test_the_sampler_has_its_own_temperature() -> None:
    case = Case()
    at = torch.arange(NUM), case.targets
    logits = (case.hidden @ case.head.T).detach()
    for temperature, expected in ((0.5, (logits / 0.5).log_softmax(-1)[at]), (0.0, (logits / 2).log_softmax(-1)[at])):
        result = case.run(stage_of("reverse_kl", temperature=temperature, kl_temperature=2.0))
        torch.testing.assert_close(result.logprobs, expected)


def test_micro_batches_add_up() -> None:
    case = Case()
    for loss in ALL:
        stage = stage_of(loss, correction=CorrectionConfig(max_mean_gap=0.1))
        whole = case.run(stage)
        total = torch.zeros((), dtype=torch.float64)
        for rows in (ROWS < 1, ROWS >= 1):
            names = ("rows", "positions", "targets", "sampler_logprobs")
            batch = replace(case.batch, **{name: getattr(case.batch, name)[rows] for name in names})
            task = Distill(hidden=case.teacher_hidden[rows], head=case.teacher_head)
            part = distill(stage, task, case.hidden[rows], case.head, batch, case.weights[rows], TILES)
            total = total + part.loss
        assert total.item() == pytest.approx(whole.loss.item(), rel=1e-11)
        for one, two in zip(case.gradients(total), case.gradients(whole.loss), strict=True):
            assert relative(one, two) <= 1e-11


# ---- in a learner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "topk_reverse_kl", "topk_tail_reverse_kl"])
def test_a_learner_comes_closer_to_its_teachers(models: dict[str, ModelConfig], loss: str) -> None:
    """And every number it reports has a meaning in the catalogue."""
    store, groups = Memory(), make_groups(5)
    signals, heads = make_teachers(groups, store)
    stage = stage_of(
        loss,
        learning_rate=1e-2,
        warmup_steps=0,
        reference_kl=0.01,
        masked_ids=[3],
        correction=CorrectionConfig(max_mean_gap=5.0, veto=1e-6, max_k3=100.0),
    )
    learner = Learner(settings_for(models["dense"], stage), store)
    plan = plan_of(groups, signals)
    steps = [merge_stats([learner.step(plan, heads)]) for _ in range(6)]
    assert steps[-1]["distill/reverse_kl"] < 0.97 * steps[0]["distill/reverse_kl"]
    assert steps[0]["distill/kl_to_reference/sums"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["distill/kl_to_reference/sums"] > 1e-3
    for name in ("special_share", "geometric_share", "veto_share", "k3_share"):
        assert 0.0 <= steps[0][f"distill/{name}/words"] < 1.0
    assert all(describe(key) is not None for key in steps[0])


def test_grpo_drops_what_its_correction_names(models: dict[str, ModelConfig]) -> None:
    """OPSM at a threshold that nothing passes changes nothing; at one that all pass, negative advantages go."""
    groups = make_groups(4)
    signals = advantages_of(groups)
    norms = []
    for delta, sign in ((1e6, None), (-1e6, None), (-1e6, -1.0)):
        correction = CorrectionConfig(opsm_delta=delta)
        stage = GrpoConfig(learning_rate=1e-3, warmup_steps=0, correction=correction)
        learner = Learner(settings_for(models["dense"], stage), Memory())
        chosen = [[Advantage(value=sign) if sign else s for s in row] for row in signals]
        metrics = merge_stats([learner.step(plan_of(groups, chosen), {})])
        share = metrics["grpo/opsm_share/sums"]
        assert share == 0 if delta > 0 else 0 < share <= 1
        norms.append(metrics["train/grad_norm"])
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)
    assert norms[2] == 0.0
