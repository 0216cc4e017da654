"""Log-probabilities, GRPO and the train/sampler gap against slow oracles, and identities that no wrong formula has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd.divergence import compare
from opd.logits import TileSizes
from opd.losses import group_advantages, grpo_loss, likeliest, logsumexp_at, sampler_gap, token_logprobs
from tests import oracles
from tests.test_divergence import SHAPES, from_logits, random_inputs, relative


def softmax_pair(vocab_size: int = 13, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab_size, generator=generator, dtype=torch.float64) * 1.5
    return logits[0], logits[1]


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_logprobs_match_dense_autograd(shape: tuple, dtype: torch.dtype) -> None:
    *sizes, temperature, tile_tokens, tile_vocab = shape
    hidden, head, *_, targets = random_inputs(*sizes, dtype=dtype)
    upstream = torch.linspace(-1, 2, len(hidden), dtype=dtype)
    logprobs, entropy = token_logprobs(
        hidden, head, targets, temperature=temperature, tile_tokens=tile_tokens, tile_vocab=tile_vocab
    )
    expected = oracles.dense_token_logprobs(hidden, head, targets, upstream, temperature)
    value_error, gradient_error = (1e-12, 1e-12) if dtype == torch.float64 else (5e-6, 1e-5)
    torch.testing.assert_close(logprobs.double(), expected["logprobs"], atol=value_error, rtol=value_error)
    torch.testing.assert_close(entropy.double(), expected["entropy"], atol=value_error, rtol=value_error)
    assert not entropy.requires_grad
    hidden_grad, head_grad = torch.autograd.grad((upstream * logprobs).sum(), (hidden, head))
    if sizes[1] > 1:
        assert relative(hidden_grad, expected["hidden_grad"]) <= gradient_error
        assert relative(head_grad, expected["head_grad"]) <= gradient_error


def test_token_logprobs_are_those_of_the_comparison() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(9, 50, 6, 7, torch.float32)
    inputs = (hidden, head, teacher_hidden, teacher_head)
    several = torch.randint(50, (9, 3), generator=torch.Generator().manual_seed(3))
    for tile_tokens, tile_vocab in ((9, 50), (4, 12)):
        for ids in (targets, several):
            tiles = TileSizes(tile_tokens=tile_tokens, tile_vocab=tile_vocab)
            result = compare(*inputs, ids, temperature=1.7, **tiles)
            logprobs, entropy = token_logprobs(hidden, head, ids, temperature=1.7, **tiles)
            assert torch.equal(logprobs, result.student_logprobs)
            assert torch.equal(entropy, result.student_entropy)
            upstream = torch.linspace(-1, 2, ids.numel()).view(ids.shape)
            mine = torch.autograd.grad((upstream * logprobs).sum(), inputs[:2])
            theirs = torch.autograd.grad((upstream * result.student_logprobs).sum(), inputs[:2])
            for one, two in zip(mine, theirs, strict=True):
                assert relative(one, two) <= 1e-6


def test_likeliest_is_top_k_of_the_whole_row() -> None:
    hidden, head, *_ = random_inputs(9, 50, 6, 7, torch.float32)
    for k in (1, 7, 50):
        expected = (hidden @ head.T).topk(k).indices
        for tile_tokens, tile_vocab in ((9, 50), (4, 12), (2, 3)):
            assert torch.equal(likeliest(hidden, head, k, tile_tokens=tile_tokens, tile_vocab=tile_vocab), expected)
    assert likeliest(hidden[:0], head, 3).shape == (0, 3)
    for k in (0, 51):
        with pytest.raises(ValueError, match=f"k={k} is not allowed; it must be 1 to 50"):
            likeliest(hidden, head, k)


def test_token_logprobs_of_no_tokens_and_of_bfloat16() -> None:
    hidden, head, *_, targets = random_inputs(0, 8, 4, 4, torch.float32)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    assert logprobs.shape == entropy.shape == (0,)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(logprobs.sum(), (hidden, head)))
    hidden, head, *_, targets = random_inputs(5, 20, 4, 4, torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, head, targets, tile_vocab=6)
    expected = oracles.dense_token_logprobs(hidden, head, targets, torch.ones(5))
    assert logprobs.dtype == torch.float32
    assert (logprobs - expected["logprobs"]).abs().max() <= 5e-6
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].dtype == torch.bfloat16


def test_logsumexp_at_tells_one_head_from_another() -> None:
    _, _, hidden, head, _ = random_inputs(3, 100, 4, 16, torch.float32)
    expected = (hidden.double() @ head.double().T).logsumexp(-1)
    for tile_vocab in (8192, 100, 33, 1):
        torch.testing.assert_close(
            logsumexp_at(hidden, head, tile_vocab=tile_vocab).double(), expected, atol=5e-6, rtol=0
        )
    assert logsumexp_at(hidden[:0], head).shape == (0,)
    assert (logsumexp_at(hidden * 1.1, head) - expected).abs().min() > 1e-2


# ---- GRPO and the train/sampler gap ----------------------------------------------------------------------------------


def grpo_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    policy, sampler, reference = -torch.rand(3, 50, generator=generator, dtype=torch.float64) * 2
    advantages = torch.randn(50, generator=generator, dtype=torch.float64)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), sampler, reference, advantages, weights


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_grpo_matches_the_scalar_formulas(coefficient: float) -> None:
    policy, sampler, reference, advantages, weights = grpo_inputs()
    result = grpo_loss(
        policy,
        sampler,
        advantages,
        weights,
        clip=0.2,
        reference_logprobs=reference,
        kl_coefficient=coefficient,
    )
    loss, gradient = oracles.scalar_grpo(
        policy.tolist(), sampler.tolist(), advantages.tolist(), weights.tolist(), 0.2, reference.tolist(), coefficient
    )
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    (actual,) = torch.autograd.grad(result.loss, policy)
    torch.testing.assert_close(actual, torch.tensor(gradient, dtype=torch.float64), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(result.ratio, (policy - sampler).exp().detach())
    assert bool((result.reference_kl >= 0).all())
    if coefficient == 0.0:
        without = grpo_loss(policy, sampler, advantages, weights, clip=0.2)
        assert torch.equal(without.loss, result.loss)
        assert without.reference_kl.count_nonzero() == 0
        # Clipped is exactly where the surrogate has no slope.
        assert torch.equal(result.clipped, actual == 0)
        assert 0 < int(result.clipped.sum()) < 50


def test_grpo_clips_only_the_side_that_the_advantage_pushes_to() -> None:
    policy = torch.tensor([0.5, -0.5, 0.5, -0.5]).log1p().requires_grad_()  # ratios 1.5, 0.5, 1.5, 0.5
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    result = grpo_loss(policy, torch.zeros(4), advantages, torch.ones(4), clip=0.2)
    assert result.clipped.tolist() == [True, False, False, True]
    assert result.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8))


def test_grpo_stays_finite_at_any_ratio() -> None:
    policy = torch.tensor([-1000.0, 0.0, -5.0]).requires_grad_()
    sampler = torch.tensor([0.0, -1000.0, -5.0])
    reference = torch.tensor([0.0, -1000.0, -900.0])
    result = grpo_loss(
        policy, sampler, -torch.ones(3), torch.ones(3), clip=0.2, reference_logprobs=reference, kl_coefficient=0.1
    )
    (gradient,) = torch.autograd.grad(result.loss, policy)
    assert bool(result.loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert float(result.ratio[1]) == pytest.approx(math.exp(20), rel=1e-6)


def test_grpo_needs_a_reference_for_its_kl() -> None:
    with pytest.raises(ValueError, match=r"kl_coefficient=0\.1 needs reference_logprobs"):
        grpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.ones(2), clip=0.2, kl_coefficient=0.1)


def test_the_expected_kl_term_has_the_gradient_of_the_exact_kl() -> None:
    """E over the sampler, by enumeration, of V3.2's term: value and gradient of KL(policy || reference)."""
    z, u = softmax_pair()
    sampler = softmax_pair(seed=4)[0].log_softmax(-1)
    exact, row = from_logits(z[None], u[None])
    (expected,) = torch.autograd.grad(exact.reverse_kl.sum(), row)
    logits = z.clone().requires_grad_()
    result = grpo_loss(
        logits.log_softmax(-1),
        sampler,
        torch.zeros(13, dtype=torch.float64),
        sampler.exp(),
        clip=0.2,
        reference_logprobs=u.log_softmax(-1),
        kl_coefficient=1.0,
    )
    (actual,) = torch.autograd.grad(result.loss, logits)
    assert result.loss.item() == pytest.approx(exact.reverse_kl[0].item(), rel=1e-12)
    torch.testing.assert_close(actual, expected[0], atol=1e-15, rtol=1e-12)


def test_the_expected_score_function_gradient_is_that_of_the_exact_kl() -> None:
    """E over the policy, by enumeration, of GRPO with the advantage log q - log p (k1): the reverse KL's gradient, with
    any baseline; and of a constant advantage: none."""
    z, u = softmax_pair()
    exact, row = from_logits(z[None], u[None])
    (expected,) = torch.autograd.grad(exact.reverse_kl.sum(), row)
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)

    def gradient_of(advantages: Tensor) -> Tensor:
        logits = z.clone().requires_grad_()
        loss = grpo_loss(logits.log_softmax(-1), log_p, advantages, log_p.exp(), clip=0.2).loss
        return torch.autograd.grad(loss, logits)[0]

    for baseline in (0.0, -1.7):
        torch.testing.assert_close(gradient_of(log_q - log_p - baseline), expected[0], atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(gradient_of(torch.ones_like(z)), torch.zeros_like(z), atol=1e-16, rtol=0)


def test_group_advantages_are_centred_and_not_scaled() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([10.0, 0.0]) == [5.0, -5.0]
    assert group_advantages([1, 0, 0]) == [1 - 1 / 3, -1 / 3, -1 / 3]
    assert group_advantages([0.1] * 3) == [0.0] * 3  # 0.1 + 0.1 + 0.1 divided by 3 is not 0.1
    assert group_advantages([0.7]) == [0.0]
    with pytest.raises(ValueError, match="rewards is empty"):
        group_advantages([])


def test_sampler_gap_by_hand_and_merged() -> None:
    policy = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    sampler = torch.tensor([-1.0, -1.0, -2.5, -3.1])
    gaps = [0.0, -1.0, 2.0, 0.1]  # log policy - log sampler
    whole = sampler_gap(policy, sampler)
    assert whole == pytest.approx(
        {
            "num_tokens": 4.0,
            "k1": -sum(gaps),
            "k3": sum(math.exp(gap) - 1 - gap for gap in gaps),
            "ratio": sum(math.exp(gap) for gap in gaps),
            "ratio_squared": sum(math.exp(2 * gap) for gap in gaps),
            "num_outside": 2.0,
            "max_gap": 2.0,
        },
        rel=1e-6,
    )
    parts = [
        sampler_gap(policy[:1], sampler[:1]),
        sampler_gap(policy[1:], sampler[1:]),
        sampler_gap(policy[:0], sampler[:0]),
    ]
    merged = {key: (max if key == "max_gap" else sum)(part[key] for part in parts) for key in whole}
    assert merged == pytest.approx(whole, rel=1e-12)
    same = sampler_gap(policy, policy)
    assert [same[key] for key in ("k1", "k3", "num_outside", "max_gap")] == [0, 0, 0, 0]
    assert math.isfinite(sampler_gap(torch.tensor([0.0]), torch.tensor([-5000.0]))["ratio_squared"])


def test_sampler_gap_estimates_the_kl_in_expectation() -> None:
    """Over the whole vocabulary, drawn in proportion to the sampler: k1 and k3 average to KL(sampler || policy)."""
    counts = torch.tensor([4, 2, 1, 1])
    sampler = (counts / 8).double().log().repeat_interleave(counts)
    policy = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64).log().repeat_interleave(counts)
    gap = sampler_gap(policy, sampler)
    kl = float((sampler - policy).mean())
    assert gap["k1"] / 8 == pytest.approx(kl, rel=1e-12)
    assert gap["k3"] / 8 == pytest.approx(kl, rel=1e-12)
    assert gap["ratio"] / 8 == pytest.approx(1.0, rel=1e-12)
