"""Corrections against their table, and what they mean: expectations that come out right, trajectories that go whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd.config import CorrectionConfig
from opd.correction import correct
from opd.losses import token_logprobs
from tests import oracles

RATIOS = ("none", "tis", "mis", "icepop", "sequence_tis", "sequence_mis")


def random_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and sampler [N], and rows of five trajectories of unequal length, one of them close."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.tensor([0] * 7 + [1] * 3 + [2] + [3] * 5 + [4] * 4)
    policy = -torch.rand(len(rows), generator=generator, dtype=torch.float64) * 3
    gap = torch.randn(len(rows), generator=generator, dtype=torch.float64) * 0.6
    gap[rows == 3] *= 0.01
    return policy, policy - gap, rows


@pytest.mark.parametrize("ratio", RATIOS)
def test_importance_weights_match_the_table(ratio: str) -> None:
    policy, sampler, rows = random_tokens()
    config = CorrectionConfig(ratio=ratio, low=0.7, high=1.4)
    corrected = correct(config, policy.requires_grad_(), sampler, rows)
    expected = oracles.scalar_correction(policy.tolist(), sampler.tolist(), rows.tolist(), ratio, 0.7, 1.4)
    torch.testing.assert_close(corrected.importance, torch.tensor(expected, dtype=torch.float64))
    assert not corrected.importance.requires_grad
    assert bool((corrected.mask == 1).all())
    if ratio == "none":
        assert corrected.shares == {}
        return
    (name, share), *_ = corrected.shares.items()
    assert name == ("ratio_truncated_share" if ratio.endswith("tis") else "ratio_masked_share")
    r = torch.tensor(
        oracles.scalar_correction(
            policy.tolist(), sampler.tolist(), rows.tolist(), "sequence_tis" if "seq" in ratio else "tis", 0, math.inf
        )
    )
    assert share.tolist() == [bool(value > 1.4 or (ratio == "icepop" and value < 0.7)) for value in r]
    assert 0 < int(share.sum()) < len(share)  # some are changed and some are not


def test_masks_drop_whole_trajectories_by_their_own_rule() -> None:
    policy, sampler, rows = random_tokens()
    gaps = [(policy - sampler)[rows == row] for row in range(5)]
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, -2.0], dtype=torch.float64)[rows]
    rules = {
        "max_mean_gap": ("geometric_share", 0.2, lambda g, _: abs(g.mean()) > 0.2),
        "max_k3": ("k3_share", 0.1, lambda g, _: (g.exp() - 1 - g).mean() > 0.1),
        "veto": ("veto_share", 0.5, lambda g, _: bool((g.exp() < 0.5).any())),
        "opsm_delta": ("opsm_share", 0.05, lambda g, a: a < 0 and -g.mean() > 0.05),
    }
    for key, (name, bound, rule) in rules.items():
        corrected = correct(CorrectionConfig(**{key: bound}), policy, sampler, rows, advantages=advantages)
        dropped = [bool(rule(gap, advantages[rows == row][0])) for row, gap in enumerate(gaps)]
        assert corrected.shares.keys() == {name}
        assert corrected.shares[name].tolist() == [dropped[row] for row in rows.tolist()], key
        assert corrected.mask.tolist() == [float(not dropped[row]) for row in rows.tolist()], key
        assert bool((corrected.importance == 1).all())
        assert any(dropped), key
        assert not all(dropped), key


def test_masks_add_up_and_leave_the_importance_alone() -> None:
    policy, sampler, rows = random_tokens()
    alone = [CorrectionConfig(max_mean_gap=0.2), CorrectionConfig(veto=0.5)]
    masks = [correct(config, policy, sampler, rows).mask for config in alone]
    both = correct(CorrectionConfig(max_mean_gap=0.2, veto=0.5, ratio="tis", high=1.4), policy, sampler, rows)
    assert torch.equal(both.mask, masks[0] * masks[1])
    assert both.shares.keys() == {"ratio_truncated_share", "geometric_share", "veto_share"}
    assert torch.equal(
        both.importance, correct(CorrectionConfig(ratio="tis", high=1.4), policy, sampler, rows).importance
    )


def test_stale_tokens_go_one_by_one() -> None:
    policy, sampler, rows = random_tokens()
    gaps = torch.arange(len(rows)) % 3
    corrected = correct(CorrectionConfig(), policy, sampler, rows, version_gaps=gaps, max_version_gap=1)
    assert torch.equal(corrected.mask, (gaps <= 1).double())
    assert torch.equal(corrected.shares["stale_share"], gaps > 1)
    with pytest.raises(ValueError, match="max_version_gap=1 needs version_gaps"):
        correct(CorrectionConfig(), policy, sampler, rows, max_version_gap=1)
    with pytest.raises(ValueError, match=r"opsm_delta=0\.5 needs advantages"):
        correct(CorrectionConfig(opsm_delta=0.5), policy, sampler, rows)


def test_a_policy_that_sampled_its_own_tokens_needs_no_correction() -> None:
    policy, _, rows = random_tokens()
    for ratio in RATIOS:
        config = CorrectionConfig(ratio=ratio, max_mean_gap=1e-9, max_k3=1e-9, veto=0.999, opsm_delta=1e-9)
        corrected = correct(config, policy, policy, rows, advantages=-torch.ones_like(policy))
        assert bool((corrected.importance == 1).all())
        assert bool((corrected.mask == 1).all())
        assert not any(bool(share.any()) for share in corrected.shares.values())


def test_wide_bounds_make_an_expectation_over_the_sampler_right() -> None:
    """E over mu of r f is E over p of f, by enumeration: tokens as trajectories of one token each."""
    z, u = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, mu, values = z.log_softmax(-1), u.log_softmax(-1), torch.linspace(-1, 3, 9, dtype=torch.float64)
    for ratio in ("tis", "mis", "icepop", "sequence_tis", "sequence_mis"):
        config = CorrectionConfig(ratio=ratio, low=1e-6, high=1e6)
        importance = correct(config, p, mu, torch.arange(9)).importance
        assert (mu.exp() * importance * values).sum().item() == pytest.approx((p.exp() * values).sum().item())


def test_extreme_gaps_stay_finite_and_no_tokens_are_no_matter() -> None:
    policy, sampler = torch.tensor([-5000.0, -0.0, -1.0]), torch.tensor([-0.0, -5000.0, -1.0])
    everything = CorrectionConfig(ratio="sequence_tis", high=1e30, max_mean_gap=100.0, max_k3=1e30, veto=1e-30)
    corrected = correct(everything, policy, sampler, torch.tensor([0, 1, 2]))
    assert bool(corrected.importance.isfinite().all())
    assert corrected.importance[1] == pytest.approx(math.exp(20), rel=1e-5)
    none = torch.zeros(0)
    assert correct(everything, none, none, torch.zeros(0, dtype=torch.int64)).mask.shape == (0,)


def test_the_factor_carries_no_gradient() -> None:
    hidden = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    head = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0, 1, 2, 3]))
    corrected = correct(CorrectionConfig(ratio="tis", high=1e6), logprobs, logprobs.detach() - 0.3, torch.arange(4))
    (gradient,) = torch.autograd.grad((corrected.importance * logprobs).sum(), hidden, retain_graph=True)
    (plain,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(gradient, math.exp(0.3) * plain)
