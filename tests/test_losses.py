"""Losses against dense float64 oracles, and the identities that hold for no wrong formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opd.losses import (
    KlResult,
    group_advantages,
    grpo_loss,
    logsumexp_at,
    reverse_kl,
    sampler_gap,
    token_logprobs,
)
from tests import oracles

# (tokens, vocabulary, student width, teacher width, temperature, tile_tokens, tile_vocab)
SHAPES = [
    (7, 37, 5, 9, 1.0, 1024, 8192),  # one tile
    (7, 37, 5, 9, 0.7, 7, 37),  # one tile, filled
    (7, 37, 5, 9, 1.0, 3, 8),  # ragged tiles both ways
    (5, 16, 4, 4, 2.5, 1024, 8),  # fewer tokens than a tile, vocabulary a multiple
    (11, 23, 6, 3, 0.5, 4, 1),  # tiles one entry wide
    (3, 19, 2, 2, 1.0, 1, 1),
    (1, 1, 3, 3, 1.0, 1, 1),  # a vocabulary of one
    (64, 301, 16, 24, 1.3, 16, 100),
]


def random_inputs(
    num_tokens: int, vocab_size: int, student_width: int, teacher_width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """student hidden and head (both with gradients), teacher hidden and head, weights (one of them 0), targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)

    hidden, head = normal(num_tokens, student_width, 1.0), normal(vocab_size, student_width, 2 / student_width**0.5)
    teacher = normal(num_tokens, teacher_width, 1.0), normal(vocab_size, teacher_width, 2 / teacher_width**0.5)
    weights = torch.rand(num_tokens, generator=generator)
    if num_tokens > 2:
        weights[1] = 0.0
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), *teacher, weights, targets


def from_logits(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None, **options: float
) -> tuple[KlResult, Tensor]:
    """KL of given logits [N, V] and dL/dz [N, V]: hidden states are the logits, heads the identity."""
    z = student_logits.clone().requires_grad_()
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    weights = torch.ones(len(z)) if weights is None else weights
    targets = torch.zeros(len(z), dtype=torch.int64)
    result = reverse_kl(z, identity, teacher_logits, identity, weights, targets, **options)  # pyright: ignore[reportArgumentType]
    (gradient,) = torch.autograd.grad(result.loss, z)
    return result, gradient


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def softmax_pair(vocab_size: int = 13, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab_size, generator=generator, dtype=torch.float64) * 1.5
    return logits[0], logits[1]


# ---- reverse KL ------------------------------------------------------------------------------------------------------

KL_FIELDS = ("kl", "student_entropy", "teacher_entropy", "student_logprobs", "teacher_logprobs")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reverse_kl_matches_dense_autograd(shape: tuple, dtype: torch.dtype) -> None:
    *sizes, temperature, tile_tokens, tile_vocab = shape
    inputs = random_inputs(*sizes, dtype=dtype)
    result = reverse_kl(*inputs, temperature=temperature, tile_tokens=tile_tokens, tile_vocab=tile_vocab)
    expected = oracles.dense_reverse_kl(*inputs, temperature)
    hidden_grad, head_grad = torch.autograd.grad(result.loss, inputs[:2])
    value_error, gradient_error = (1e-12, 1e-12) if dtype == torch.float64 else (5e-6, 1e-5)
    assert result.loss.dtype == dtype
    for field in KL_FIELDS:
        actual = getattr(result, field)
        assert not actual.requires_grad
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected[field], atol=value_error, rtol=value_error)
    torch.testing.assert_close(
        result.loss.double(), expected["loss"], atol=value_error, rtol=value_error, check_dtype=False
    )
    assert torch.equal(result.top1_agree, expected["top1_agree"])
    if sizes[1] > 1:
        assert relative(hidden_grad, expected["hidden_grad"]) <= gradient_error
        assert relative(head_grad, expected["head_grad"]) <= gradient_error
    else:
        assert hidden_grad.count_nonzero() == head_grad.count_nonzero() == 0


@pytest.mark.parametrize("tiles", [(1024, 8192), (17, 500)])
def test_float32_resolves_a_small_kl(tiles: tuple[int, int]) -> None:
    """A student close to its teacher: the KL of about 0.01 is the difference of numbers near 7."""
    hidden, head, *_, weights, targets = random_inputs(40, 2000, 32, 32, torch.float32)
    noise = torch.Generator().manual_seed(9)
    teacher_head = head.detach() + 0.05 * torch.randn(head.shape, generator=noise) / 32**0.5 * 3
    inputs = (hidden, head, hidden.detach(), teacher_head, weights, targets)
    result = reverse_kl(*inputs, tile_tokens=tiles[0], tile_vocab=tiles[1])
    expected = oracles.dense_reverse_kl(*inputs)
    assert 1e-3 < expected["kl"].mean() < 5e-2
    assert (result.kl - expected["kl"]).abs().max() <= 2e-6
    gradients = torch.autograd.grad(result.loss, (hidden, head))
    assert relative(gradients[0], expected["hidden_grad"]) <= 1e-5
    assert relative(gradients[1], expected["head_grad"]) <= 1e-5


@pytest.mark.parametrize("tiles", [(1024, 8192), (5, 10)])
def test_bfloat16_inputs_are_multiplied_in_float32(tiles: tuple[int, int]) -> None:
    inputs = random_inputs(12, 67, 16, 8, torch.bfloat16)
    options = {"tile_tokens": tiles[0], "tile_vocab": tiles[1]}
    result = reverse_kl(*inputs, **options)
    gradients = torch.autograd.grad(result.loss, inputs[:2])
    expected = oracles.dense_reverse_kl(*inputs)
    for field in KL_FIELDS:
        assert getattr(result, field).dtype == torch.float32
        assert (getattr(result, field) - expected[field]).abs().max() <= 5e-6
    # Bit for bit the float32 computation on the same values; only the gradients are rounded to the inputs' dtype.
    upcast = tuple(tensor.detach().float().requires_grad_() for tensor in inputs[:4])
    in_float32 = reverse_kl(upcast[0], upcast[1], upcast[2], upcast[3], *inputs[4:], **options)
    assert torch.equal(result.kl, in_float32.kl)
    for actual, exact in zip(gradients, torch.autograd.grad(in_float32.loss, upcast[:2]), strict=True):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, exact.bfloat16())


def test_mixed_dtypes_use_the_widest() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(6, 20, 4, 4, torch.float32)
    result = reverse_kl(hidden, head.bfloat16(), teacher_hidden.double(), teacher_head, weights, targets)
    assert result.kl.dtype == torch.float64
    result = reverse_kl(hidden, head.bfloat16(), teacher_hidden.bfloat16(), teacher_head, weights, targets)
    assert result.kl.dtype == torch.float32


def test_gradient_reaches_only_the_student_and_scales_with_the_upstream_one() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(6, 20, 4, 5, torch.float64)
    teacher_hidden.requires_grad_()
    teacher_head.requires_grad_()
    for tile_vocab in (20, 7):
        loss = reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, tile_vocab=tile_vocab).loss
        once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
        thrice = torch.autograd.grad(-3.0 * loss, (hidden, head), retain_graph=True)
        (only_head,) = torch.autograd.grad(loss, (head,), retain_graph=True)
        torch.testing.assert_close([-3.0 * gradient for gradient in once], list(thrice))
        assert torch.equal(only_head, once[1])
        loss.backward()
        assert torch.equal(hidden.grad, once[0])  # pyright: ignore[reportArgumentType]
        hidden.grad = head.grad = None
        assert teacher_hidden.grad is None
        assert teacher_head.grad is None
        frozen = reverse_kl(
            hidden, head.detach(), teacher_hidden, teacher_head, weights, targets, tile_vocab=tile_vocab
        )
        assert torch.equal(torch.autograd.grad(frozen.loss, hidden)[0], once[0])


@pytest.mark.parametrize("tiles", [(1024, 8192), (4, 1024), (3, 7)])
def test_a_student_that_is_its_teacher_has_exactly_no_loss(tiles: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, *_, weights, targets = random_inputs(10, 33, 8, 8, dtype)
        result = reverse_kl(
            hidden, head, hidden, head, weights, targets, temperature=0.9, tile_tokens=tiles[0], tile_vocab=tiles[1]
        )
        gradients = torch.autograd.grad(result.loss, (hidden, head))
        assert result.kl.count_nonzero() == 0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)
        assert torch.equal(result.student_entropy, result.teacher_entropy)
        assert torch.equal(result.student_logprobs, result.teacher_logprobs)
        assert bool(result.top1_agree.all())


def test_tiles_token_order_and_batch_do_not_matter() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = inputs = random_inputs(20, 57, 6, 9, torch.float64)
    whole = reverse_kl(*inputs)
    reference = torch.autograd.grad(whole.loss, (hidden, head))
    for tile_tokens, tile_vocab in ((20, 1), (1, 57), (6, 13), (19, 56), (100, 19)):
        tiled = reverse_kl(*inputs, tile_tokens=tile_tokens, tile_vocab=tile_vocab)
        for field in (*KL_FIELDS, "top1_agree", "loss"):
            torch.testing.assert_close(getattr(tiled, field), getattr(whole, field), atol=1e-12, rtol=1e-12)
        for actual, expected in zip(torch.autograd.grad(tiled.loss, (hidden, head)), reference, strict=True):
            assert relative(actual, expected) <= 1e-12
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = reverse_kl(hidden[order], head, teacher_hidden[order], teacher_head, weights[order], targets[order])
    torch.testing.assert_close(shuffled.kl, whole.kl[order], atol=1e-13, rtol=1e-12)
    for actual, expected in zip(torch.autograd.grad(shuffled.loss, (hidden, head)), reference, strict=True):
        assert relative(actual, expected) <= 1e-12
    # Two micro-batches, added up, are the whole.
    pieces = [slice(0, 8), slice(8, 20)]
    losses = [
        reverse_kl(hidden[s], head, teacher_hidden[s], teacher_head, weights[s], targets[s], tile_vocab=9).loss
        for s in pieces
    ]
    for actual, expected in zip(torch.autograd.grad(losses[0] + losses[1], (hidden, head)), reference, strict=True):
        assert relative(actual, expected) <= 1e-12


def test_permuting_the_vocabulary_permutes_the_head_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = inputs = random_inputs(9, 31, 6, 4, torch.float64)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(2))
    plain = reverse_kl(*inputs, tile_vocab=8)
    (expected,) = torch.autograd.grad(plain.loss, head)
    permuted_head = head.detach()[order].requires_grad_()
    permuted = reverse_kl(
        hidden, permuted_head, teacher_hidden, teacher_head[order], weights, order.argsort()[targets], tile_vocab=8
    )
    (actual,) = torch.autograd.grad(permuted.loss, permuted_head)
    for field in (*KL_FIELDS, "top1_agree"):
        torch.testing.assert_close(getattr(permuted, field), getattr(plain, field), atol=1e-12, rtol=1e-12)
    assert relative(actual, expected[order]) <= 1e-12


def test_a_constant_added_to_a_row_of_logits_changes_nothing() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(9, 31, 6, 4, torch.float64)
    plain = reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, tile_vocab=8)
    shift = torch.linspace(-300, 500, 9, dtype=torch.float64)[:, None]
    ones = torch.ones(31, 1, dtype=torch.float64)
    shifted = reverse_kl(
        torch.cat((hidden, shift), 1),
        torch.cat((head, ones), 1),
        torch.cat((teacher_hidden, -shift), 1),
        torch.cat((teacher_head, ones), 1),
        weights,
        targets,
        tile_vocab=8,
    )
    for field in KL_FIELDS:
        torch.testing.assert_close(getattr(shifted, field), getattr(plain, field), atol=1e-11, rtol=1e-11)


def test_gradient_in_the_logits_is_the_closed_form_and_sums_to_zero() -> None:
    generator = torch.Generator().manual_seed(5)
    z, u = torch.randn(2, 6, 40, generator=generator, dtype=torch.float64) * 3
    log_p, log_q = z.log_softmax(-1), u.log_softmax(-1)
    log_ratio = log_p - log_q
    kl = (log_p.exp() * log_ratio).sum(-1, keepdim=True)
    for dtype, row_sum, error in ((torch.float64, 1e-14, 1e-13), (torch.float32, 1e-6, 1e-5)):
        for tile_vocab in (40, 11):
            _, gradient = from_logits(z.to(dtype), u.to(dtype), tile_vocab=tile_vocab)
            assert bool((gradient.sum(-1).abs() <= row_sum * gradient.abs().sum(-1)).all())
            assert relative(gradient, log_p.exp() * (log_ratio - kl)) <= error


@pytest.mark.parametrize("tile_vocab", [64, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rows(tile_vocab: int, dtype: torch.dtype) -> None:
    vocab_size, huge = 64, 1e4
    ordinary = torch.randn(vocab_size, generator=torch.Generator().manual_seed(6), dtype=dtype)
    one_hot = torch.zeros(vocab_size, dtype=dtype).index_fill(0, torch.tensor([50]), huge)
    other_hot = torch.zeros(vocab_size, dtype=dtype).index_fill(0, torch.tensor([3]), huge)
    uniform = torch.full((vocab_size,), -huge, dtype=dtype)
    rows = [(ordinary, one_hot), (one_hot, ordinary), (one_hot, other_hot), (one_hot, one_hot), (ordinary, uniform)]
    rows += [(uniform, ordinary), (one_hot, uniform), (ordinary * huge, -ordinary * huge)]
    z, u = (torch.stack(side) for side in zip(*rows, strict=True))
    result, gradient = from_logits(z, u, tile_vocab=tile_vocab)
    identity = torch.eye(vocab_size, dtype=torch.float64)
    expected = oracles.dense_reverse_kl(z, identity, u, identity, torch.ones(8), torch.zeros(8, dtype=torch.int64))
    for field in KL_FIELDS:
        torch.testing.assert_close(
            getattr(result, field), expected[field], atol=5e-6, rtol=1e-6, check_dtype=False, msg=field
        )
    assert bool(gradient.isfinite().all())
    assert relative(gradient, expected["hidden_grad"]) <= 1e-5
    assert result.kl[2] == huge  # all of p on one entry that q holds to be e^-10000
    assert result.kl[3] == 0
    assert float(result.kl[4]) == pytest.approx(math.log(vocab_size) - float(result.student_entropy[4]), abs=5e-6)
    assert float(result.kl[6]) == pytest.approx(math.log(vocab_size), abs=5e-6)


def test_no_tokens_and_no_weight() -> None:
    for tile_vocab in (8, 3):
        for num_tokens, scale in ((0, 1.0), (4, 0.0)):
            hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(
                num_tokens, 8, 4, 5, torch.float32
            )
            weights = weights * scale
            result = reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, tile_vocab=tile_vocab)
            gradients = torch.autograd.grad(result.loss, (hidden, head))
            assert result.loss == 0
            assert result.kl.shape == result.top1_agree.shape == (num_tokens,)
            assert result.top1_agree.dtype == torch.bool
            assert [gradient.shape for gradient in gradients] == [hidden.shape, head.shape]
            assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_several_teachers_are_their_geometric_mean() -> None:
    """sum_i w_i KL(p || q_i) = w KL(p || q_geo) - w log Z, with q_geo of the weighted mean of the teachers' logits."""
    generator = torch.Generator().manual_seed(7)
    z, *teachers = torch.randn(4, 5, 29, generator=generator, dtype=torch.float64) * 2
    shares = (0.2, 0.5, 1.1)
    total = sum(shares)
    mean_log = sum(w * u.log_softmax(-1) for w, u in zip(shares, teachers, strict=True)) / total
    assert isinstance(mean_log, Tensor)
    ones = torch.ones(5, dtype=torch.float64)
    parts = [from_logits(z, u, w * ones, tile_vocab=10) for w, u in zip(shares, teachers, strict=True)]
    mean, mean_gradient = from_logits(z, mean_log, total * ones, tile_vocab=10)
    left = sum(w * part[0].kl for w, part in zip(shares, parts, strict=True))
    assert isinstance(left, Tensor)
    torch.testing.assert_close(left, total * mean.kl - total * mean_log.logsumexp(-1), atol=1e-12, rtol=1e-12)
    assert relative(parts[0][1] + parts[1][1] + parts[2][1], mean_gradient) <= 1e-12


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
    hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(4, 8, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="vocabulary of 8, teacher_head one of 7"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head[:7], weights, targets)
    with pytest.raises(ValueError, match=r"teacher_hidden has shape \(4, 5\) and teacher_head \(8, 3\)"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head[:, :3], weights, targets)
    with pytest.raises(ValueError, match="student_hidden has 4 tokens, teacher_hidden has 3"):
        reverse_kl(hidden, head, teacher_hidden[:3], teacher_head, weights, targets)
    with pytest.raises(ValueError, match=r"weights has shape \(4, 1\)"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head, weights[:, None], targets)
    with pytest.raises(ValueError, match="ids from 0 to 8; student_head has ids 0 to 7"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, torch.tensor([0, 8, 1, 1]))
    with pytest.raises(ValueError, match=r"targets is torch\.int32"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets.int())
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        token_logprobs(hidden, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="tile_vocab=0"):
        token_logprobs(hidden, head, targets, tile_vocab=0)


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("tile_vocab", [8, 3])
def test_names_the_id_whose_teacher_logit_is_not_finite(bad: float, tile_vocab: int) -> None:
    z, u = torch.zeros(4, 8), torch.zeros(4, 8)
    u[2, 5] = bad
    identity, bias = torch.eye(8), torch.zeros(8, 1)
    bias[6] = bad
    targets, weights = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    # From a head whose bias column holds it, so that every position has it at one id.
    teacher_hidden, teacher_head = torch.cat((z, torch.ones(4, 1)), 1), torch.cat((identity, bias), 1)
    with pytest.raises(ValueError, match=f"token id 6 is {bad} at position 0"):
        reverse_kl(z, identity, teacher_hidden, teacher_head, weights, targets, tile_vocab=tile_vocab)
    # A student at fault is not the teacher's error: the loss shows it.
    assert bool(reverse_kl(u, identity, z, identity, weights, targets, tile_vocab=tile_vocab).loss.isnan())


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


@pytest.mark.parametrize("loss", ["reverse_kl", "token_logprobs"])
def test_memory_is_three_tiles_whatever_the_number_of_tokens(loss: str) -> None:
    tile_tokens, tile_vocab, vocab_size, width = 64, 256, 1024, 8
    tile_bytes = 4 * tile_tokens * tile_vocab

    def peak(num_tokens: int) -> int:
        hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(
            num_tokens, vocab_size, width, width, torch.float32
        )

        def step() -> None:
            tiles = {"tile_tokens": tile_tokens, "tile_vocab": tile_vocab}
            if loss == "reverse_kl":
                result = reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, **tiles).loss
            else:
                result = token_logprobs(hidden, head, targets, **tiles)[0].sum()
            torch.autograd.grad(result, (hidden, head))

        step()
        return peak_bytes(step)

    few, many = peak(128), peak(8 * 128)
    head_grad, per_token = 4 * vocab_size * width, 4 * (2 * width + 64)  # generous: gradient, and rows of statistics
    assert few > 2 * tile_bytes  # the measurement sees the tiles
    for num_tokens, measured in ((128, few), (8 * 128, many)):
        assert measured <= 3 * tile_bytes + 2 * head_grad + num_tokens * per_token
    assert many < 4 * (8 * 128) * vocab_size / 8  # an eighth of one [N, V] tensor


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


def test_token_logprobs_are_those_of_reverse_kl() -> None:
    hidden, head, teacher_hidden, teacher_head, weights, targets = random_inputs(9, 50, 6, 7, torch.float32)
    for tile_vocab in (50, 12):
        options = {"temperature": 1.7, "tile_tokens": 4, "tile_vocab": tile_vocab}
        result = reverse_kl(hidden, head, teacher_hidden, teacher_head, weights, targets, **options)
        logprobs, entropy = token_logprobs(hidden, head, targets, **options)
        assert torch.equal(logprobs, result.student_logprobs)
        assert torch.equal(entropy, result.student_entropy)


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
    _, _, hidden, head, *_ = random_inputs(3, 100, 4, 16, torch.float32)
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
    exact, expected = from_logits(z[None], u[None])
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
    assert result.loss.item() == pytest.approx(float(exact.kl[0]), rel=1e-12)
    torch.testing.assert_close(actual, expected[0], atol=1e-15, rtol=1e-12)


def test_the_expected_score_function_gradient_is_that_of_the_exact_kl() -> None:
    """E over the policy, by enumeration, of GRPO with the advantage log q - log p (k1): the reverse KL's gradient, with
    any baseline; and of a constant advantage: none."""
    z, u = softmax_pair()
    _, expected = from_logits(z[None], u[None])
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
