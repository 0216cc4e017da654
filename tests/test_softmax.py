"""Softmaxes over tiles by compiled loops: against float64, at every width, and the same bits in any company."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd.kernels import softmax
from opd.kernels.library import operators
from opd.losses import token_logprobs

pytestmark = pytest.mark.skipif(operators() is None, reason="nothing can be compiled here")
WIDTHS = (1, 7, 16, 17, 100, 1000)


def logits(rows: int, width: int, seed: int = 0, scale: float = 6.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale - 3.0


def close(found: Tensor, expected: Tensor, bound: float = 2e-6) -> bool:
    return float((found - expected).abs().amax() / expected.abs().amax().clamp_min(1.0)) < bound


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_float64(width: int) -> None:
    z, u = logits(33, width), logits(33, width, seed=1)
    x, y = z.double(), u.double()
    x, y = x - x.amax(1, keepdim=True), y - y.amax(1, keepdim=True)
    p, q = x.exp2(), y.exp2()
    expected = (
        z.amax(1), u.amax(1), p.sum(1), q.sum(1), (p * x).sum(1), (q * y).sum(1), (p * (x - y)).sum(1),
        (q * (y - x)).sum(1), ((x == 0) & (y == 0)).any(1).double(),
    )  # fmt: skip
    one, z_left, u_left = z.clone(), z.clone(), u.clone()
    for found, exact in zip(softmax.sums(one), (expected[0], expected[2], expected[4]), strict=True):
        assert close(found, exact)
    found = softmax.pair_sums(z_left, u_left)
    assert all(close(part, exact) for part, exact in zip(found, expected, strict=True))
    assert torch.equal(one, z - z.amax(1, keepdim=True)) and torch.equal(one, z_left)
    assert torch.equal(u_left, u - u.amax(1, keepdim=True))
    # A row alone has the bits it has among others.
    for part, alone in zip(found, softmax.pair_sums(z[5:6].clone(), u[5:6].clone()), strict=True):
        assert torch.equal(part[5:6], alone)


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_those_of_float64(width: int) -> None:
    z, u = logits(20, width), logits(20, width, seed=1)
    numbers = torch.stack((z.amax(1), u.amax(1), *torch.randn(4, 20, generator=torch.Generator().manual_seed(2))))
    top, top_u, offset, slope, constant, teacher = (number.double()[:, None] for number in numbers)
    x, y = z.double() - top, u.double() - top_u
    expected = x.exp2() * (slope * (x - y - offset) + constant)
    out = torch.full_like(z, torch.nan)
    assert close(softmax.pair_gradient(z, u, numbers, False, out), expected)
    assert close(softmax.pair_gradient(z, u, numbers, True, out), expected - y.exp2() * teacher)
    assert close(softmax.gradient(z, numbers[0], numbers[3], out), x.exp2() * slope)
    into = z.clone()
    assert torch.equal(softmax.gradient(into, numbers[0], numbers[3], into), out)


def test_equal_sides_have_a_gradient_of_exactly_nothing() -> None:
    z = logits(9, 50)
    numbers = torch.rand(6, 9, generator=torch.Generator().manual_seed(3))
    numbers[1], numbers[2], numbers[5] = numbers[0], 0.0, numbers[4]
    assert not softmax.pair_gradient(z, z.clone(), numbers, True, torch.empty_like(z)).any()


def test_what_is_not_finite_is_seen() -> None:
    z, u = logits(6, 40), logits(6, 40, seed=1)
    z[0, 3], z[1, 39], z[2, 0], u[3, 17], z[4, 5] = torch.nan, torch.nan, torch.inf, -torch.inf, -torch.inf
    reverse, forward = softmax.pair_sums(z, u)[6:8]
    assert not reverse[:4].isfinite().any() and not forward[3:5].isfinite().any()
    assert reverse[5].isfinite() and forward[5].isfinite()
    assert softmax.sums(torch.full((1, 5), torch.nan))[0].isnan().all()


def test_weights_below_what_a_float_holds_are_zero() -> None:
    z = torch.tensor([[0.0, -125.5, -127.0, -1e30]])
    _, mass, moment = softmax.sums(z)
    assert mass.item() == 1.0 and math.isclose(moment.item(), -125.5 * 2**-125.5, rel_tol=1e-3, abs_tol=1e-36)


def test_log_probs_of_a_whole_loss_are_those_of_float64() -> None:
    """Tiles that do not divide the vocabulary, kept and made again."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(70, 24, generator=generator), torch.randn(301, 24, generator=generator) * 0.3
    targets = torch.randint(301, (70,), generator=generator)
    weights = torch.rand(70, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    expected = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(1, targets[:, None])[:, 0]
    of_exact = torch.autograd.grad((expected * weights).sum(), exact)
    for tiles in ((70, 301), (16, 128), (9, 13)):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        found, _ = token_logprobs(inputs[0], inputs[1], targets, tile_tokens=tiles[0], tile_vocab=tiles[1])
        assert (found - expected).abs().amax() < 1e-5
        for part, whole in zip(torch.autograd.grad((found * weights).sum(), inputs), of_exact, strict=True):
            assert (part - whole).abs().amax() < 1e-5
