"""Exact divergences against dense float64 autograd, and the identities that hold for no wrong formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opd.divergence import Comparison, compare, jensen_shannon
from opd.logits import TileSizes
from opd.losses import token_logprobs
from tests import oracles

# (tokens, vocabulary, student width, teacher width, temperature, tile_tokens, tile_vocab)
SHAPES = [
    (7, 37, 5, 9, 1.0, 1024, 8192),  # one tile
    (7, 37, 5, 9, 0.7, 7, 37),  # one tile, filled
    (7, 37, 5, 9, 1.0, 3, 8),  # ragged tiles both ways
    (7, 37, 5, 9, 1.0, 7, 19),  # few enough to be kept for the backward
    (5, 16, 4, 4, 2.5, 1024, 8),  # fewer tokens than a tile, vocabulary a multiple
    (11, 23, 6, 3, 0.5, 4, 1),  # tiles one entry wide
    (3, 19, 2, 2, 1.0, 1, 1),
    (1, 1, 3, 3, 1.0, 1, 1),  # a vocabulary of one
    (64, 301, 16, 24, 1.3, 16, 100),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
DIFFERENTIABLE = ("reverse_kl", "forward_kl", "student_logprobs")
DETACHED = ("teacher_logprobs", "student_entropy", "teacher_entropy")


def random_inputs(
    num_tokens: int, vocab_size: int, student_width: int, teacher_width: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """student hidden and head (both with gradients), teacher hidden and head, targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)

    hidden, head = normal(num_tokens, student_width, 1.0), normal(vocab_size, student_width, 2 / student_width**0.5)
    teacher = normal(num_tokens, teacher_width, 1.0), normal(vocab_size, teacher_width, 2 / teacher_width**0.5)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), *teacher, targets


def random_weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_logits(z: Tensor, u: Tensor, tile_tokens: int = 512, tile_vocab: int = 2048) -> tuple[Comparison, Tensor]:
    """Comparison of logits [N, V], and the z it depends on: hidden states are the logits, heads the identity."""
    z = z.clone().requires_grad_()
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    targets, tiles = torch.zeros(len(z), dtype=torch.int64), TileSizes(tile_tokens=tile_tokens, tile_vocab=tile_vocab)
    return compare(z, identity, u, identity, targets, **tiles), z


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def check_against_dense(inputs: Inputs, *, temperature: float, beta: float, tiles: TileSizes) -> None:
    """Values of all fields, and gradients of each differentiable one and of all together under random weights."""
    dtype = inputs[0].dtype if inputs[0].dtype == torch.float64 else torch.float32
    value_error, gradient_error = (1e-12, 1e-12) if dtype == torch.float64 else (5e-6, 1e-5)
    mixture, result = jensen_shannon(*inputs, beta=beta, temperature=temperature, **tiles)
    actual = {name: getattr(result, name) for name in (*DIFFERENTIABLE, *DETACHED)} | {"jensen_shannon": mixture}
    exact = inputs[0].detach().double().requires_grad_(), inputs[1].detach().double().requires_grad_()
    expected = oracles.dense_divergences(*exact, *inputs[2:], temperature, beta)
    for name, value in actual.items():
        assert value.dtype == dtype
        assert value.requires_grad == (name not in DETACHED)
        torch.testing.assert_close(value.double(), expected[name], atol=value_error, rtol=value_error, msg=name)
    assert torch.equal(result.top1_agree, expected["top1_agree"])
    names = (*DIFFERENTIABLE, "jensen_shannon")
    weights = {name: random_weights(*actual[name].shape, seed=seed) for seed, name in enumerate(names)}
    for chosen in (*((name,) for name in names), names):
        loss = sum((weights[name].to(dtype) * actual[name]).sum() for name in chosen)
        dense = sum((weights[name].to(dtype).double() * expected[name]).sum() for name in chosen)
        assert isinstance(loss, Tensor)
        assert isinstance(dense, Tensor)
        gradients = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
        dense_gradients = torch.autograd.grad(dense, exact, retain_graph=True)
        for got, wanted in zip(gradients, dense_gradients, strict=True):
            if len(inputs[1]) > 1:
                assert relative(got, wanted) <= gradient_error, chosen
            else:
                assert got.abs().max() <= 1e-6  # a vocabulary of one has nothing to learn


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_match_dense_autograd(shape: tuple, dtype: torch.dtype) -> None:
    *sizes, temperature, tile_tokens, tile_vocab = shape
    inputs = random_inputs(*sizes, dtype=dtype)
    tiles = TileSizes(tile_tokens=tile_tokens, tile_vocab=tile_vocab)
    check_against_dense(inputs, temperature=temperature, beta=0.3, tiles=tiles)


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
def test_jensen_shannon_at_other_shares(beta: float) -> None:
    inputs = random_inputs(7, 37, 5, 9, torch.float64)
    check_against_dense(inputs, temperature=1.0, beta=beta, tiles=TileSizes(tile_tokens=3, tile_vocab=8))


def test_several_targets_per_token() -> None:
    hidden, head, teacher_hidden, teacher_head, _ = random_inputs(9, 50, 6, 7, torch.float64)
    inputs = (hidden, head, teacher_hidden, teacher_head)
    targets = torch.randint(50, (9, 4), generator=torch.Generator().manual_seed(3))
    targets[0] = targets[0, 0]  # the same id, four times
    check_against_dense((*inputs, targets), temperature=1.2, beta=0.5, tiles=TileSizes(tile_tokens=4, tile_vocab=12))
    none = compare(*inputs, targets[:, :0])
    assert none.student_logprobs.shape == (9, 0)
    assert torch.equal(none.reverse_kl, compare(*inputs, targets[:, 0]).reverse_kl)


@pytest.mark.parametrize("tiles", [(1024, 8192), (17, 500)])
def test_float32_resolves_a_small_kl(tiles: tuple[int, int]) -> None:
    """A student close to its teacher: the KL of about 0.01 is the difference of numbers near 7."""
    hidden, head, *_, targets = random_inputs(40, 2000, 32, 32, torch.float32)
    noise = torch.Generator().manual_seed(9)
    teacher_head = head.detach() + 0.05 * torch.randn(head.shape, generator=noise) / 32**0.5 * 3
    inputs = (hidden, head, hidden.detach(), teacher_head, targets)
    mixture, result = jensen_shannon(*inputs, beta=0.5, tile_tokens=tiles[0], tile_vocab=tiles[1])
    exact = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    expected = oracles.dense_divergences(*exact, *inputs[2:])
    assert 1e-3 < expected["reverse_kl"].mean() < 5e-2
    pairs = ((result.reverse_kl, "reverse_kl"), (result.forward_kl, "forward_kl"), (mixture, "jensen_shannon"))
    for actual, name in pairs:
        assert (actual - expected[name]).abs().max() <= 2e-6
        gradients = torch.autograd.grad(actual.sum(), (hidden, head), retain_graph=True)
        dense_gradients = torch.autograd.grad(expected[name].sum(), exact, retain_graph=True)
        for got, wanted in zip(gradients, dense_gradients, strict=True):
            assert relative(got, wanted) <= 1e-5, name


@pytest.mark.parametrize("tiles", [(1024, 8192), (5, 10)])
def test_bfloat16_inputs_are_multiplied_in_float32(tiles: tuple[int, int]) -> None:
    inputs = random_inputs(12, 67, 16, 8, torch.bfloat16)
    options = TileSizes(tile_tokens=tiles[0], tile_vocab=tiles[1])
    result = compare(*inputs, **options)
    gradients = torch.autograd.grad(result.reverse_kl.sum(), inputs[:2])
    expected = oracles.dense_divergences(*inputs)
    for field in (*DIFFERENTIABLE, *DETACHED):
        assert getattr(result, field).dtype == torch.float32
        assert (getattr(result, field) - expected[field]).abs().max() <= 5e-6
    # Bit for bit the float32 computation on the same values; only the gradients are rounded to the inputs' dtype.
    upcast = tuple(tensor.detach().float().requires_grad_() for tensor in inputs[:4])
    in_float32 = compare(upcast[0], upcast[1], upcast[2], upcast[3], inputs[4], **options)
    assert torch.equal(result.reverse_kl, in_float32.reverse_kl)
    for actual, exact in zip(gradients, torch.autograd.grad(in_float32.reverse_kl.sum(), upcast[:2]), strict=True):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, exact.bfloat16())


def test_mixed_dtypes_use_the_widest() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(6, 20, 4, 4, torch.float32)
    result = compare(hidden, head.bfloat16(), teacher_hidden.double(), teacher_head, targets)
    assert result.reverse_kl.dtype == torch.float64
    result = compare(hidden, head.bfloat16(), teacher_hidden.bfloat16(), teacher_head, targets)
    assert result.reverse_kl.dtype == torch.float32


@pytest.mark.parametrize("tile_vocab", [20, 7, 1])
def test_gradient_reaches_only_the_student_and_scales_with_the_upstream_one(tile_vocab: int) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(6, 20, 4, 5, torch.float64)
    teacher_hidden.requires_grad_()
    teacher_head.requires_grad_()
    tiles = TileSizes(tile_tokens=2, tile_vocab=tile_vocab)
    loss = compare(hidden, head, teacher_hidden, teacher_head, targets, **tiles).reverse_kl.sum()
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(-3.0 * loss, (hidden, head), retain_graph=True)
    (only_head,) = torch.autograd.grad(loss, (head,), retain_graph=True)
    torch.testing.assert_close([-3.0 * gradient for gradient in once], list(thrice))
    assert torch.equal(only_head, once[1])
    loss.backward()
    assert torch.equal(hidden.grad, once[0])  # pyright: ignore[reportArgumentType]
    assert teacher_hidden.grad is None
    assert teacher_head.grad is None
    frozen = compare(hidden, head.detach(), teacher_hidden, teacher_head, targets, **tiles)
    assert torch.equal(torch.autograd.grad(frozen.reverse_kl.sum(), hidden)[0], once[0])
    with torch.no_grad():
        assert not compare(hidden, head, teacher_hidden, teacher_head, targets, **tiles).reverse_kl.requires_grad


@pytest.mark.parametrize("tiles", [(1024, 8192), (4, 1024), (3, 7), (2, 5)])
def test_a_student_that_is_its_teacher_has_exactly_no_loss(tiles: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, *_, targets = random_inputs(10, 33, 8, 8, dtype)
        mixture, result = jensen_shannon(
            hidden, head, hidden, head, targets, beta=0.3, temperature=0.9, tile_tokens=tiles[0], tile_vocab=tiles[1]
        )
        assert torch.equal(result.student_entropy, result.teacher_entropy)
        assert torch.equal(result.student_logprobs, result.teacher_logprobs)
        assert bool(result.top1_agree.all())
        for divergence in (result.reverse_kl, result.forward_kl, mixture):
            assert divergence.count_nonzero() == 0
            gradients = torch.autograd.grad(divergence.sum(), (hidden, head), retain_graph=True)
            assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_tiles_token_order_and_batch_do_not_matter() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs = random_inputs(20, 57, 6, 9, torch.float64)
    weights = random_weights(3, 20)

    def loss_of(result: Comparison, mixture: Tensor, rows: Tensor) -> Tensor:
        columns = torch.stack((result.reverse_kl, result.student_logprobs, mixture))
        return (weights[:, rows] * columns).sum()

    everything = torch.arange(20)
    mixture, whole = jensen_shannon(*inputs, beta=0.4)
    reference = torch.autograd.grad(loss_of(whole, mixture, everything), (hidden, head))
    for tile_tokens, tile_vocab in ((20, 1), (1, 57), (6, 13), (19, 56), (100, 19), (10, 15)):
        tiled_mixture, tiled = jensen_shannon(*inputs, beta=0.4, tile_tokens=tile_tokens, tile_vocab=tile_vocab)
        for field in (*DIFFERENTIABLE, *DETACHED, "top1_agree"):
            torch.testing.assert_close(getattr(tiled, field), getattr(whole, field), atol=1e-12, rtol=1e-12)
        gradients = torch.autograd.grad(loss_of(tiled, tiled_mixture, everything), (hidden, head))
        for actual, expected in zip(gradients, reference, strict=True):
            assert relative(actual, expected) <= 1e-12
    # In any order, and in two micro-batches that are added up.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for pieces in ((order,), (order[:8], order[8:])):
        total = torch.zeros((), dtype=torch.float64)
        for rows in pieces:
            args = (hidden[rows], head, teacher_hidden[rows], teacher_head, targets[rows])
            part_mixture, part = jensen_shannon(*args, beta=0.4, tile_vocab=9)
            torch.testing.assert_close(part.forward_kl, whole.forward_kl[rows], atol=1e-13, rtol=1e-12)
            total = total + loss_of(part, part_mixture, rows)
        for actual, expected in zip(torch.autograd.grad(total, (hidden, head)), reference, strict=True):
            assert relative(actual, expected) <= 1e-12


def test_permuting_the_vocabulary_permutes_the_head_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs = random_inputs(9, 31, 6, 4, torch.float64)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(2))
    plain = compare(*inputs, tile_vocab=8)
    (expected,) = torch.autograd.grad(plain.reverse_kl.sum(), head)
    permuted_head = head.detach()[order].requires_grad_()
    permuted = compare(
        hidden, permuted_head, teacher_hidden, teacher_head[order], order.argsort()[targets], tile_vocab=8
    )
    (actual,) = torch.autograd.grad(permuted.reverse_kl.sum(), permuted_head)
    for field in (*DIFFERENTIABLE, *DETACHED, "top1_agree"):
        torch.testing.assert_close(getattr(permuted, field), getattr(plain, field), atol=1e-12, rtol=1e-12)
    assert relative(actual, expected[order]) <= 1e-12


def test_a_constant_added_to_a_row_of_logits_changes_nothing() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(9, 31, 6, 4, torch.float64)
    plain = compare(hidden, head, teacher_hidden, teacher_head, targets, tile_vocab=8)
    shift = torch.linspace(-300, 500, 9, dtype=torch.float64)[:, None]
    ones = torch.ones(31, 1, dtype=torch.float64)
    shifted = compare(
        torch.cat((hidden, shift), 1),
        torch.cat((head, ones), 1),
        torch.cat((teacher_hidden, -shift), 1),
        torch.cat((teacher_head, ones), 1),
        targets,
        tile_vocab=8,
    )
    for field in (*DIFFERENTIABLE, *DETACHED):
        torch.testing.assert_close(getattr(shifted, field), getattr(plain, field), atol=1e-11, rtol=1e-11)


def test_gradients_in_the_logits_are_the_closed_forms_and_sum_to_zero() -> None:
    generator = torch.Generator().manual_seed(5)
    z, u = torch.randn(2, 6, 40, generator=generator, dtype=torch.float64) * 3
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    closed = {"reverse_kl": p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True)), "forward_kl": p - q}
    for dtype, row_sum, error in ((torch.float64, 1e-14, 1e-13), (torch.float32, 1e-6, 1e-5)):
        for tile_vocab in (40, 11):
            result, logits = from_logits(z.to(dtype), u.to(dtype), tile_vocab=tile_vocab, tile_tokens=2)
            for name, expected in closed.items():
                (gradient,) = torch.autograd.grad(getattr(result, name).sum(), logits, retain_graph=True)
                assert bool((gradient.sum(-1).abs() <= row_sum * gradient.abs().sum(-1)).all())
                assert relative(gradient, expected) <= error


@pytest.mark.parametrize("tiles", [(8, 64), (8, 10), (1, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rows(tiles: tuple[int, int], dtype: torch.dtype) -> None:
    vocab_size, huge = 64, 1e4
    ordinary = torch.randn(vocab_size, generator=torch.Generator().manual_seed(6), dtype=dtype)
    one_hot = torch.zeros(vocab_size, dtype=dtype).index_fill(0, torch.tensor([50]), huge)
    other_hot = torch.zeros(vocab_size, dtype=dtype).index_fill(0, torch.tensor([3]), huge)
    uniform = torch.full((vocab_size,), -huge, dtype=dtype)
    rows = [(ordinary, one_hot), (one_hot, ordinary), (one_hot, other_hot), (one_hot, one_hot), (ordinary, uniform)]
    rows += [(uniform, ordinary), (one_hot, uniform), (ordinary * huge, -ordinary * huge)]
    z, u = (torch.stack(side) for side in zip(*rows, strict=True))
    z.requires_grad_()
    identity, targets = torch.eye(vocab_size, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    inputs = (z, identity, u, identity, targets)
    mixture, result = jensen_shannon(*inputs, beta=0.5, tile_tokens=tiles[0], tile_vocab=tiles[1])
    exact = z.detach().double().requires_grad_()
    expected = oracles.dense_divergences(exact, identity, u, identity, targets)
    log_p, log_q = exact.log_softmax(-1), u.double().log_softmax(-1)
    mean = torch.logaddexp(log_p, log_q) - math.log(2)  # the plain mixture underflows
    expected["jensen_shannon"] = 0.5 * (log_p.exp() * (log_p - mean) + log_q.exp() * (log_q - mean)).sum(-1)
    for field in (*DIFFERENTIABLE, *DETACHED):
        torch.testing.assert_close(
            getattr(result, field), expected[field], atol=5e-6, rtol=1e-6, check_dtype=False, msg=field
        )
    torch.testing.assert_close(mixture, expected["jensen_shannon"], atol=5e-6, rtol=1e-6, check_dtype=False)
    for actual, field in (
        (result.reverse_kl, "reverse_kl"),
        (result.forward_kl, "forward_kl"),
        (mixture, "jensen_shannon"),
    ):
        (gradient,) = torch.autograd.grad(actual.sum(), z, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected[field].sum(), exact, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert relative(gradient, wanted) <= 1e-5, field
    assert result.reverse_kl[2].item() == pytest.approx(huge, rel=1e-6)  # all of p where q holds e^-10000
    assert result.reverse_kl[3] == 0
    assert result.reverse_kl[4].item() == pytest.approx(
        math.log(vocab_size) - float(result.student_entropy[4]), abs=5e-6
    )


def test_no_tokens() -> None:
    for tile_vocab in (8, 3):
        inputs = random_inputs(0, 8, 4, 5, torch.float32)
        mixture, result = jensen_shannon(*inputs, beta=0.5, tile_vocab=tile_vocab)
        assert result.reverse_kl.shape == result.top1_agree.shape == result.student_logprobs.shape == (0,)
        assert result.top1_agree.dtype == torch.bool
        for divergence in (result.reverse_kl, mixture):
            gradients = torch.autograd.grad(divergence.sum(), inputs[:2], retain_graph=True)
            assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs[:2], strict=True))


def test_several_teachers_are_their_geometric_mean() -> None:
    """sum_i w_i KL(p || q_i) = w KL(p || q_geo) - w log Z, with q_geo of the weighted mean of the teachers' logits."""
    generator = torch.Generator().manual_seed(7)
    z, *teachers = torch.randn(4, 5, 29, generator=generator, dtype=torch.float64) * 2
    shares = (0.2, 0.5, 1.1)
    total = sum(shares)
    mean_log = sum(w * u.log_softmax(-1) for w, u in zip(shares, teachers, strict=True)) / total
    assert isinstance(mean_log, Tensor)
    values, gradients = [], []
    for weight, u in (*zip(shares, teachers, strict=True), (total, mean_log)):
        result, logits = from_logits(z, u, tile_vocab=10)
        values.append(weight * result.reverse_kl.detach())
        gradients.append(torch.autograd.grad(weight * result.reverse_kl.sum(), logits)[0])
    left = values[0] + values[1] + values[2]
    torch.testing.assert_close(left, values[3] - total * mean_log.logsumexp(-1), atol=1e-12, rtol=1e-12)
    assert relative(gradients[0] + gradients[1] + gradients[2], gradients[3]) <= 1e-12


def test_top1_agreement_across_tiles() -> None:
    u = torch.tensor([[0.0, 1.0, 5.0, 2.0, 3.0, 4.0]] * 4)
    z = torch.zeros(4, 6)
    z[0, 2] = 1.0  # the same
    z[1, 5] = 1.0  # another one, the largest of its own tile on both sides
    z[2, 2], z[2, 4] = 1.0, 2.0  # another one, though 2 is the largest of a tile
    z[3, 2], z[3, 3] = 1.0, 1.0  # a tie that holds the teacher's
    for tile_vocab in (6, 3, 2, 1):
        result, _ = from_logits(z, u, tile_vocab=tile_vocab)
        assert result.top1_agree.tolist() == [True, False, False, True]


def test_refuses_what_does_not_fit() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = random_inputs(4, 8, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="vocabulary of 8, teacher_head one of 7"):
        compare(hidden, head, teacher_hidden, teacher_head[:7], targets)
    with pytest.raises(ValueError, match=r"teacher_hidden has shape \(4, 5\) and teacher_head \(8, 3\)"):
        compare(hidden, head, teacher_hidden, teacher_head[:, :3], targets)
    with pytest.raises(ValueError, match="student_hidden has 4 tokens and teacher_hidden has 3"):
        compare(hidden, head, teacher_hidden[:3], teacher_head, targets)
    with pytest.raises(ValueError, match="ids from 0 to 8; student_head has ids 0 to 7"):
        compare(hidden, head, teacher_hidden, teacher_head, torch.tensor([0, 8, 1, 1]))
    with pytest.raises(ValueError, match=r"targets is torch\.int32"):
        compare(hidden, head, teacher_hidden, teacher_head, targets.int())
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        compare(hidden, head, teacher_hidden, teacher_head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="tile_vocab=0"):
        compare(hidden, head, teacher_hidden, teacher_head, targets, tile_vocab=0)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"beta={beta} is not allowed"):
            jensen_shannon(hidden, head, teacher_hidden, teacher_head, targets, beta=beta)


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("tile_vocab", [8, 3])
def test_names_the_id_whose_teacher_logit_is_not_finite(bad: float, tile_vocab: int) -> None:
    z, u = torch.zeros(4, 8), torch.zeros(4, 8)
    u[2, 5] = bad
    identity, bias = torch.eye(8), torch.zeros(8, 1)
    bias[6] = bad
    targets = torch.zeros(4, dtype=torch.int64)
    # From a head whose bias column holds it, so that every position has it at one id.
    teacher_hidden, teacher_head = torch.cat((z, torch.ones(4, 1)), 1), torch.cat((identity, bias), 1)
    with pytest.raises(ValueError, match=f"token id 6 is {bad} at position 0"):
        compare(z, identity, teacher_hidden, teacher_head, targets, tile_vocab=tile_vocab)
    # A student at fault is not the teacher's error: the loss shows it.
    assert bool(compare(u, identity, z, identity, targets, tile_vocab=tile_vocab).reverse_kl.sum().isnan())


def peak_bytes(function: Callable[[], object]) -> int:
    """Largest total of tensor memory that `function` holds beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    held = peak = 0
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("loss", "most_tiles"), [("reverse_kl", 4), ("token_logprobs", 2)])
def test_memory_is_a_few_tiles_whatever_the_number_of_tokens(loss: str, most_tiles: int) -> None:
    tile_tokens, tile_vocab, vocab_size, width = 64, 256, 2048, 8
    tile_bytes = 4 * tile_tokens * tile_vocab

    def peak(num_tokens: int) -> int:
        inputs = random_inputs(num_tokens, vocab_size, width, width, torch.float32)

        def step() -> None:
            tiles = TileSizes(tile_tokens=tile_tokens, tile_vocab=tile_vocab)
            if loss == "reverse_kl":
                result = compare(*inputs, **tiles).reverse_kl
            else:
                result = token_logprobs(inputs[0], inputs[1], inputs[4], **tiles)[0]
            torch.autograd.grad(result.sum(), inputs[:2])

        step()
        return peak_bytes(step)

    few, many = peak(128), peak(8 * 128)
    head_grad, per_token = 4 * vocab_size * width, 4 * (2 * width + 64)  # generous: gradient, and rows of statistics
    assert few > most_tiles / 2 * tile_bytes  # the measurement sees the tiles
    for num_tokens, measured in ((128, few), (8 * 128, many)):
        assert measured <= most_tiles * tile_bytes + 2 * head_grad + num_tokens * per_token
    assert many < 4 * (8 * 128) * vocab_size / 8  # an eighth of one [N, V] tensor
