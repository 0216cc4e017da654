"""Estimators against the dense float64 oracle, and their expectations by enumeration over a small vocabulary."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from opd.config import SAMPLED_LOSSES, TOPK_LOSSES, SampledLoss, TopkLoss
from opd.estimators import sampled_divergence, topk_divergence
from opd.losses import grpo_loss
from tests import oracles

NUM, VOCAB, TOP = 6, 13, 4


def rows(seed: int = 3, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits z and u, float64 [N, V], and targets of which some are among the teacher's likeliest and some are not."""
    generator = torch.Generator().manual_seed(seed)
    z, u = torch.randn(2, NUM, VOCAB, generator=generator, dtype=torch.float64) * scale
    order = u.argsort(descending=True)
    targets = order[torch.arange(NUM), torch.tensor([0, 3, 4, 12, 7, 1])]
    return z.requires_grad_(), u, targets


def columns(log_p: Tensor, log_q: Tensor, targets: Tensor, top_k: int = TOP) -> tuple[Tensor, Tensor, Tensor]:
    """What `topk_divergence` takes: both at the target and at the teacher's likeliest, and the ids."""
    ids = torch.cat((targets[:, None], log_q.topk(top_k).indices), dim=1)
    return log_p.gather(1, ids), log_q.gather(1, ids), ids


def divergence(name: str, log_p: Tensor, log_q: Tensor, targets: Tensor, top_k: int = TOP) -> Tensor:
    if name in TOPK_LOSSES:
        return topk_divergence(cast(TopkLoss, name), *columns(log_p, log_q, targets, top_k))
    at = torch.arange(len(targets)), targets
    return sampled_divergence(cast(SampledLoss, name), log_p[at], log_q[at])


def gradient(values: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), z, retain_graph=True)[0]


@pytest.mark.parametrize("name", [*TOPK_LOSSES, *SAMPLED_LOSSES])
def test_gradients_and_values_match_the_definitions(name: str) -> None:
    z, u, targets = rows()
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    actual, weights = divergence(name, log_p, log_q, targets), torch.linspace(-1, 2, NUM, dtype=torch.float64)
    expected = oracles.dense_losses(log_p, log_q, targets, TOP, 0.5, 0.5)[name]
    torch.testing.assert_close(gradient(weights * actual, z), gradient(weights * expected, z), atol=1e-14, rtol=1e-12)
    gap = (log_p - log_q)[torch.arange(NUM), targets]
    if name == "sampled_reverse_kl":  # the value is the estimate, not the surrogate
        expected = gap
    elif name == "topk_sampled_reverse_kl":
        inside, logs_p, logs_q = log_q.topk(TOP).indices, log_p, log_q
        own_p, own_q = logs_p.gather(1, inside), logs_q.gather(1, inside)
        outside = (inside != targets[:, None]).all(-1)
        expected = (own_p.exp() * (own_p - own_q)).sum(-1) + outside * gap
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-12)
    single = divergence(name, log_p.float(), log_q.float(), targets)
    torch.testing.assert_close(single.double(), expected, atol=5e-6, rtol=1e-5)


def expectation(name: str, z: Tensor, u: Tensor, sampler: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value and gradient in one row's z, averaged over tokens drawn from p, or from `sampler` with importance p/mu."""
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    every = torch.arange(VOCAB)
    drawn = log_p if sampler is None else sampler
    importance = (log_p - drawn).exp().detach()
    repeated = log_p.expand(VOCAB, -1), log_q.expand(VOCAB, -1)
    if name in TOPK_LOSSES:
        values = topk_divergence(cast(TopkLoss, name), *columns(*repeated, every), importance)
    else:
        values = importance * sampled_divergence(cast(SampledLoss, name), log_p, log_q)
    mean = (drawn.exp().detach() * values).sum()
    return mean.detach(), torch.autograd.grad(mean, z)[0]


@pytest.mark.parametrize("off_policy", [False, True])
def test_expectations_are_those_of_the_exact_divergence(off_policy: bool) -> None:
    z, u = (logits[0].detach() for logits in rows()[:2])
    z.requires_grad_()
    sampler = rows(seed=8)[0][0].detach().log_softmax(-1) if off_policy else None
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    reverse, forward = (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
    reverse_gradient, forward_gradient = gradient(reverse, z), gradient(forward, z)
    for name, wanted in (
        ("sampled_reverse_kl", reverse_gradient),
        ("sampled_reverse_kl_k2", reverse_gradient),
        ("sampled_forward_kl", forward_gradient),
        ("topk_sampled_reverse_kl", reverse_gradient),
    ):
        value, found = expectation(name, z, u, sampler)
        torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12, msg=name)
        if name != "sampled_reverse_kl_k2":  # all of them, k3 too, estimate the reverse KL by their value
            torch.testing.assert_close(value, reverse.detach(), atol=1e-14, rtol=1e-12, msg=name)
    assert (reverse_gradient - forward_gradient).norm() > 0.1 * reverse_gradient.norm()


def test_a_baseline_changes_the_variance_and_nothing_else() -> None:
    z, u = (logits[0].detach() for logits in rows()[:2])
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    p, kl = log_p.exp(), (log_p.exp() * (log_p - log_q)).sum()
    spreads = []
    for baseline in (None, kl.expand(VOCAB)):
        logits = z.clone().requires_grad_()
        values = sampled_divergence("sampled_reverse_kl", logits.log_softmax(-1), log_q, baseline=baseline)
        torch.testing.assert_close(values.detach(), log_p - log_q)
        single = torch.stack([torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values])
        mean = (p[:, None] * single).sum(0)
        torch.testing.assert_close(mean, p * (log_p - log_q - kl), atol=1e-14, rtol=1e-12)
        spreads.append((p * (single - mean).square().sum(-1)).sum())
    assert spreads[1] < 0.9 * spreads[0]


def test_the_policy_gradient_is_that_of_grpo_on_policy() -> None:
    z, u, targets = rows()
    at = torch.arange(NUM), targets
    log_p, log_q = z.log_softmax(-1)[at], u.log_softmax(-1)[at]
    mine = gradient(sampled_divergence("sampled_reverse_kl", log_p, log_q), z)
    advantages = (log_q - log_p).detach()
    theirs = gradient(grpo_loss(log_p, log_p.detach(), advantages, torch.ones(NUM), clip=0.2).loss, z)
    torch.testing.assert_close(mine, theirs)


def test_the_advantage_clip_bounds_both_sides() -> None:
    log_p = torch.tensor([-5.0, -0.1, -1.0, -4.0], requires_grad=True)
    log_q = torch.tensor([-1.0, -9.0, -1.5, -4.0])
    values = sampled_divergence("sampled_reverse_kl", log_p, log_q, advantage_clip=2.0)
    (slope,) = torch.autograd.grad(values.sum(), log_p)
    torch.testing.assert_close(slope, torch.tensor([-2.0, 2.0, 0.5, 0.0]))
    for name in ("sampled_reverse_kl_k2", "sampled_forward_kl"):
        for option in ({"advantage_clip": 1.0}, {"baseline": torch.zeros(4)}):
            with pytest.raises(ValueError, match=f"loss={name} has no advantage"):
                sampled_divergence(name, log_p, log_q, **option)  # pyright: ignore[reportArgumentType]


def test_bounds_and_stationary_points() -> None:
    z, u, targets = rows()
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert bool((divergence("topk_tail_reverse_kl", log_p, log_q, targets) <= full + 1e-12).all())
    for top_k in (1, TOP, VOCAB - 1, VOCAB):
        generalised = divergence("topk_reverse_kl", log_p, log_q, targets, top_k)
        assert bool((generalised >= -1e-12).all())
        tail = divergence("topk_tail_reverse_kl", log_p, log_q, targets, top_k)
        assert bool((tail >= -1e-12).all())
        if top_k == VOCAB:
            for name in ("topk_reverse_kl", "topk_renormalised_reverse_kl", "topk_tail_reverse_kl"):
                whole = divergence(name, log_p, log_q, targets, top_k)
                torch.testing.assert_close(whole, full, atol=1e-12, rtol=1e-10)
    # A student that is its teacher stays where it is, token by token; k3 and truncated forms alike.
    same = u.clone().requires_grad_()
    for name in (*TOPK_LOSSES, *SAMPLED_LOSSES):
        values = divergence(name, same.log_softmax(-1), log_q, targets)
        slope = gradient(values, same)
        if name == "topk_forward_kl":  # q(S) p_j - q_j on S: pulls mass out of the rest
            assert slope.abs().max() > 1e-3
        else:
            assert slope.abs().max() <= 1e-15, name
            assert values.abs().max() <= 1e-15, name


def test_renormalised_form_is_blind_to_the_mass_of_its_tokens() -> None:
    z, u, targets = rows()
    log_q = u.log_softmax(-1)
    raised = z.detach().clone()
    raised.scatter_add_(1, log_q.topk(TOP).indices, torch.full((NUM, TOP), 2.0, dtype=torch.float64))
    values = [
        divergence("topk_renormalised_reverse_kl", logits.log_softmax(-1), log_q, targets) for logits in (z, raised)
    ]
    torch.testing.assert_close(values[0].detach(), values[1])


def test_extreme_rows_stay_finite() -> None:
    huge = 1e4
    hot = torch.zeros(VOCAB).index_fill(0, torch.tensor([5]), huge)
    other = torch.zeros(VOCAB).index_fill(0, torch.tensor([2]), huge)
    z, u = torch.stack((hot, hot, torch.zeros(VOCAB))), torch.stack((hot, other, hot))
    z.requires_grad_()
    targets = torch.tensor([5, 5, 1])
    for name in (*TOPK_LOSSES, *SAMPLED_LOSSES):
        values = divergence(name, z.log_softmax(-1), u.log_softmax(-1), targets)
        assert bool(values.isfinite().all()), name
        assert bool(gradient(values, z).isfinite().all()), name
