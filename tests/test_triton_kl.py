"""The Triton kernels of the comparison against dense float64: on a CUDA device, or in Triton's own interpreter."""

from __future__ import annotations

import os

import pytest
import torch

import opd.divergence
from opd.divergence import compare
from tests import oracles
from tests.test_divergence import DETACHED, DIFFERENTIABLE, random_inputs, random_weights, relative

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when something first imports triton
DTYPES = [torch.float32, *([torch.bfloat16] if CUDA else [])]  # the interpreter cannot multiply bfloat16
# (tokens, vocabulary, student width, teacher width): ragged blocks, several parts, less than one block, one entry
SHAPES = [(66, 700, 20, 72), (3, 65, 16, 16), (5, 1, 4, 4), (65, 64, 130, 7)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels wherever triton is, whatever the dtype."""
    pytest.importorskip("triton")
    from opd.kernels import triton_kl

    monkeypatch.setattr(opd.divergence, "_fused", lambda inputs: triton_kl)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_match_dense_autograd(
    fused: None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = random_inputs(*shape, dtype=dtype)
    device = "cuda" if CUDA else "cpu"
    hidden, head, teacher_hidden, teacher_head = (
        tensor.detach().to(device).requires_grad_(index < 2) for index, tensor in enumerate(inputs[:4])
    )
    ids = torch.randint(shape[1], (shape[0], 3), generator=torch.Generator().manual_seed(2))
    arguments = (hidden, head, teacher_hidden, teacher_head, ids.to(device))
    result = compare(*arguments, temperature=1.3, tile_tokens=16, tile_vocab=100)
    exact = inputs[0].detach().double().requires_grad_(), inputs[1].detach().double().requires_grad_()
    expected = oracles.dense_divergences(*exact, *inputs[2:4], ids, 1.3)
    for name in (*DIFFERENTIABLE, *DETACHED):
        torch.testing.assert_close(getattr(result, name).cpu().double(), expected[name], atol=5e-6, rtol=5e-6, msg=name)
    assert torch.equal(result.top1_agree.cpu(), expected["top1_agree"])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # gradients are rounded to the inputs' dtype
    for chosen in (("reverse_kl",), ("forward_kl",), ("student_logprobs",), DIFFERENTIABLE):
        loss, dense = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64)
        for seed, name in enumerate(chosen):
            weights = random_weights(*expected[name].shape, seed=seed)
            loss = loss + (weights.float().to(device) * getattr(result, name)).sum()
            dense = dense + (weights.float().double() * expected[name]).sum()
        gradients = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
        for got, wanted in zip(gradients, torch.autograd.grad(dense, exact, retain_graph=True), strict=True):
            if shape[1] > 1:
                assert relative(got.cpu(), wanted) <= tolerance, chosen
            else:
                assert got.abs().max() <= 1e-5


def test_a_student_that_is_its_teacher_has_exactly_no_loss(fused: None) -> None:
    hidden, head, *_, targets = random_inputs(10, 333, 8, 8, torch.float32)
    device = "cuda" if CUDA else "cpu"
    hidden, head = hidden.detach().to(device).requires_grad_(), head.detach().to(device).requires_grad_()
    result = compare(hidden, head, hidden, head, targets.to(device), tile_vocab=100)
    assert result.reverse_kl.count_nonzero() == result.forward_kl.count_nonzero() == 0
    assert bool(result.top1_agree.all())
    for divergence in (result.reverse_kl, result.forward_kl):
        gradients = torch.autograd.grad(divergence.sum(), (hidden, head), retain_graph=True)
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_a_teacher_that_is_not_finite_is_refused(fused: None) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(4, 100, 8, 8, torch.float32)
    teacher_head[70] = float("inf")
    device = "cuda" if CUDA else "cpu"
    with pytest.raises(ValueError, match="token id 70"):
        compare(*(tensor.detach().to(device) for tensor in (hidden, head, teacher_hidden, teacher_head, targets)))
    none = [tensor.detach().to(device) for tensor in random_inputs(0, 9, 4, 4, torch.float32)]
    assert compare(none[0], none[1], none[2], none[3], none[4]).reverse_kl.shape == (0,)
