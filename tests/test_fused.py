"""The compiled steps between products against the plain ones of opd.model, values and gradients; and bit by bit against
themselves on other batches and numbers of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from opd.fp4 import fake_quantize
from opd.kernels import fused
from opd.kernels.library import operators
from opd.model.compressor import Compressor
from opd.model.hyper_connection import HyperConnection, HyperHead, Site
from opd.model.layers import RMSNorm, norm_rotate, rope_rotation, rotate, swiglu, unit_rms
from opd.model.moe import SCORING, Experts, affinities

pytestmark = pytest.mark.skipif(operators() is None, reason="no C++ compiler, and no library in the cache")
BOUNDS = {torch.float64: 1e-11, torch.float32: 3e-5}
DTYPES = list(BOUNDS)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).detach())


def both_ways(
    compute: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], patch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the leaves, through the compiled steps and through plain torch."""
    found = []
    for is_fused in (True, False):
        with patch.context() as context:
            if not is_fused:
                context.setattr(fused, "usable", lambda x: False)
            outputs = list(compute())
            loss = torch.stack([(out * inputs(*out.shape, seed=7).to(out)).sum() for out in outputs]).sum()
            found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return found[0], found[1]


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert error(one, other) < BOUNDS[one.dtype], f"output or gradient {index} of {len(found)}"


def connection(width: int, dtype: torch.dtype, scale: float = 0.3) -> HyperConnection:
    site = HyperConnection(4, width, 20, 1e-6, 1e-6)
    with torch.no_grad():
        for index, parameter in enumerate(site.parameters()):
            parameter.copy_(inputs(*parameter.shape, seed=index + 20, scale=scale))
    return site.to(dtype)


def hyper_head(width: int, dtype: torch.dtype) -> HyperHead:
    head = HyperHead(4, width, 1e-6, 1e-6)
    with torch.no_grad():
        for index, parameter in enumerate(head.parameters()):
            parameter.copy_(inputs(*parameter.shape, seed=index, scale=0.3))
    return head.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (15, 12), (16, 16), (33, 37), (100, 128), (7, 3)])
def test_hyper_connection(dtype: torch.dtype, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    site, streams = connection(width, dtype), inputs(4, tokens, width, dtype=dtype).requires_grad_()

    def compute() -> Sequence[Tensor]:
        at = site.collapse(streams)
        return [at.hidden, at.post, at.residual, site.expand(at, at.hidden.tanh())]

    agree(*both_ways(compute, [streams, *site.parameters()], monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (15, 12), (16, 16), (33, 37), (600, 128), (7, 3)])
def test_expansion_into_the_next_site(
    dtype: torch.dtype, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, head = connection(width, dtype), connection(width, dtype, scale=0.2), hyper_head(width, dtype)
    streams = inputs(4, tokens, width, dtype=dtype).requires_grad_()

    def compute() -> Sequence[Tensor]:
        one = first.collapse(streams)
        two = first.expand_into(one, one.hidden.tanh(), second)
        return [*two, *second.expand_into_head(two, two.hidden.sin(), head)]

    leaves = [streams, *first.parameters(), *second.parameters(), *head.parameters()]
    agree(*both_ways(compute, leaves, monkeypatch))


def test_gradient_of_the_next_site_where_only_some_of_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, head = (connection(24, torch.float64), connection(24, torch.float64), hyper_head(24, torch.float64))
    streams = inputs(4, 20, 24).requires_grad_()
    leaves = [streams, *first.parameters()]

    def one() -> Site:
        return first.collapse(streams)

    for compute in (
        lambda: [first.expand_into(at := one(), at.hidden, second).streams],
        lambda: [first.expand_into(at := one(), at.hidden, second).hidden],
        lambda: [first.expand_into(at := one(), at.hidden, second).residual],
        lambda: [first.expand_into_head(at := one(), at.hidden, head)[1]],
    ):
        agree(*both_ways(compute, leaves, monkeypatch))


def test_expansion_into_the_next_site_is_bit_for_bit_the_two_steps(threads: Callable[[int], None]) -> None:
    """And its gradients are the same on any number of threads."""
    first, second = connection(128, torch.float32), connection(128, torch.float32, scale=0.2)
    streams, output = (inputs(*shape, dtype=torch.float32) for shape in ((4, 5000, 128), (5000, 128)))
    threads(1)
    at = first.collapse(streams)
    expected = second.collapse(first.expand(at, output))
    leaves = [streams.requires_grad_(), output.requires_grad_(), *first.parameters(), *second.parameters()]
    found = []
    for count in (1, 2):
        threads(count)
        following = first.expand_into(at := first.collapse(streams), output * 1, second)
        assert all(torch.equal(*pair) for pair in zip(following, expected, strict=True))
        out = torch.stack([(part * inputs(*part.shape, dtype=part.dtype)).sum() for part in following])
        found.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_gradient_reaches_streams_that_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    site, streams = connection(24, torch.float64), inputs(4, 20, 24).requires_grad_()
    agree(*both_ways(lambda: [site.collapse(streams).hidden], [streams, *site.parameters()], monkeypatch))


def test_one_embedding_in_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    site, embedded = connection(24, torch.float64), inputs(20, 24).requires_grad_()

    def compute() -> Sequence[Tensor]:
        at = site.collapse(embedded.expand(4, -1, -1))
        return [site.expand(at, at.hidden), at.streams]

    agree(*both_ways(compute, [embedded, *site.parameters()], monkeypatch))


def test_second_use_of_the_streams_keeps_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What collapse adds in place is a gradient that nobody else holds."""
    site, streams = connection(24, torch.float64), inputs(4, 20, 24).requires_grad_()

    def compute() -> Sequence[Tensor]:
        at = site.collapse(streams)
        return [site.expand(at, at.hidden), at.streams * 2, streams * 3]

    agree(*both_ways(compute, [streams, *site.parameters()], monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hyper_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    head, streams = hyper_head(40, dtype), inputs(4, 21, 40, dtype=dtype).requires_grad_()
    agree(*both_ways(lambda: [head(streams)], [streams, *head.parameters()], monkeypatch))


def test_large_coefficients_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    site, streams = connection(16, torch.float64, scale=30.0), inputs(4, 50, 16, scale=20.0).requires_grad_()
    found, expected = both_ways(lambda: [site.expand(at := site.collapse(streams), at.hidden)], [streams], monkeypatch)
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert error(found[0], expected[0]) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 33, 128])
def test_norms(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, norm = inputs(5, 130, width, dtype=dtype).requires_grad_(), RMSNorm(width, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(inputs(width, seed=3))
    agree(*both_ways(lambda: [norm(x), unit_rms(x, 1e-3)], [x, norm.weight], monkeypatch))


def test_a_frozen_norm_gets_no_gradient() -> None:
    x, weight = inputs(9, 6).requires_grad_(), nn.Parameter(inputs(6), requires_grad=False)
    fused.norm_turn(x, weight, None, 1e-5).sum().backward()
    assert weight.grad is None and x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "of_rotation"),
    [
        ((3, 10, 4, 12), (10, 1)),  # heads, positions shared by the rows
        ((3, 10, 4, 12), (3, 10, 1)),  # heads, positions of their own
        ((3, 10, 12), (10,)),
        ((3, 10, 12), (3, 10)),
        ((3, 1, 4, 12), (3, 1, 1)),  # a decoding step
        ((1, 10, 12), (1, 10)),
        ((7, 12), (7,)),
        ((3, 10, 1, 12), (10, 1)),
    ],
)
def test_rotation(
    dtype: torch.dtype, shape: tuple[int, ...], of_rotation: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = torch.randint(0, 500, of_rotation, generator=torch.Generator().manual_seed(1))
    rotation = rope_rotation(positions, torch.tensor([1.0, 0.3, 0.05]))
    x, weight = inputs(*shape, dtype=dtype).requires_grad_(), inputs(12, seed=4, dtype=dtype).requires_grad_()
    assert fused.turns_of(x, rotation) is not None

    def compute() -> Sequence[Tensor]:
        return [rotate(x, rotation), rotate(x, rotation.conj()), norm_rotate(x, weight, 1e-4, rotation)]

    agree(*both_ways(compute, [x, weight], monkeypatch))


def test_a_rotation_laid_out_otherwise_goes_the_plain_way() -> None:
    rotation = rope_rotation(torch.arange(20).view(2, 1, 10), torch.tensor([1.0]))
    x = inputs(2, 3, 10, 6)
    assert fused.turns_of(x, rotation) is None
    expected = torch.stack(
        [torch.stack([rotate(head, turn[0]) for head in row]) for row, turn in zip(x, rotation, strict=True)]
    )
    assert error(rotate(x, rotation), expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 50, 300])
@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_swiglu(dtype: torch.dtype, width: int, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = (inputs(2, 17, width, seed=s, dtype=dtype, scale=4.0).requires_grad_() for s in (1, 2))
    joint = inputs(19, 2 * width, seed=3, dtype=dtype, scale=4.0).requires_grad_()
    agree(*both_ways(lambda: [swiglu(gate, up, limit), swiglu(joint, None, limit)], [gate, up, joint], monkeypatch))


def test_exponentials_over_the_whole_range() -> None:
    gate = torch.linspace(-800, 800, 100_001, dtype=torch.float64)
    found = swiglu(gate, torch.ones_like(gate), 1e9)
    assert error(found, torch.nn.functional.silu(gate)) < 1e-15
    single = gate.float()
    expected = torch.nn.functional.silu(single.double())
    found = swiglu(single, torch.ones_like(single), 1e9).double()
    assert float(((found - expected) / expected.abs().clamp_min(1e-30)).abs()[gate.abs() < 60].max()) < 1e-6


def test_what_is_not_finite_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        x = inputs(4, 20, 16)
        x[1, 3, 2] = bad
        assert not bool(connection(16, torch.float64).collapse(x).hidden[3].isfinite().all())
        assert bool(connection(16, torch.float64).collapse(x).hidden[4].isfinite().all())
        assert bool(unit_rms(x, 1e-6)[1, 3].isnan().any())
    assert bool(swiglu(torch.tensor([float("nan")]), torch.ones(1), 1.0).isnan().all())
    assert bool(swiglu(torch.ones(1), torch.tensor([float("nan")]), 1.0).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts(6, 20, 10, 1.0, quantized=False).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(experts.parameters()):
            parameter.copy_(inputs(*parameter.shape, seed=index, scale=0.5))
    x, weights = inputs(41, 20, dtype=dtype).requires_grad_(), inputs(41, 3, seed=5, dtype=dtype).requires_grad_()
    chosen = torch.rand(41, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :3]  # expert 5 has no rows
    agree(*both_ways(lambda: [experts(x, weights, chosen)], [x, weights, *experts.parameters()], monkeypatch))


def compressor(ratio: int, width: int, overlap: bool, dtype: torch.dtype) -> Compressor:
    module = Compressor(20, width, ratio, overlap, 1e-6)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(inputs(*parameter.shape, seed=index, scale=0.6))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("ratio", "width", "length"),
    [(4, 32, 128), (4, 16, 31), (3, 6, 8), (16, 40, 50), (1, 5, 7), (4, 8, 4), (4, 8, 5), (5, 19, 900)],
)
def test_pooling_of_whole_sequences(
    ratio: int, width: int, length: int, overlap: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = compressor(ratio, width, overlap, dtype)
    h, frequencies = inputs(3, length, 20, dtype=dtype).requires_grad_(), torch.tensor([1.0, 0.1])
    found, expected = both_ways(lambda: [module.compress(h, frequencies)], [h, *module.parameters()], monkeypatch)
    assert found[0].shape == (3, length // ratio, width)
    agree(found, expected)


def test_pooling_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    module = compressor(4, 32, True, torch.float32)
    h, frequencies = inputs(9, 700, 20, dtype=torch.float32).requires_grad_(), torch.tensor([1.0])
    found = []
    for count in (1, 2):
        threads(count)
        entries = module.compress(h, frequencies)
        found.append([entries, *torch.autograd.grad((entries * 3).sin().sum(), [h, *module.parameters()])])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(module.compress(h[4:5, :333], frequencies), found[0][0][4:5, :83])
    assert module.compress(h[:, :3], frequencies).shape == (9, 0, 32)


def test_large_and_missing_gates_pool_as_a_softmax_would() -> None:
    kv, gate, bias = inputs(2, 8, 6), inputs(2, 8, 6, seed=1, scale=300.0), inputs(4, 6, seed=2)
    gate[0, 0], gate[1, 5, 2] = -torch.inf, float("nan")
    found = fused.pool(kv, gate, bias, False)
    weights = (gate.view(2, 2, 4, 6) + bias).softmax(2)
    expected = (weights * kv.view(2, 2, 4, 6)).sum(2)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("seed", range(12))
def test_mxfp4_values_bit_for_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-140, 120, (64, 1), generator=generator)
    x = torch.randn(64, 96, generator=generator) * torch.exp2(exponents.float())
    if seed % 3 == 0:
        x = (torch.randn(64, 96, generator=generator) * 8).round() / 8  # many ties
    x[3], x[4, 5] = 0.0, -0.0
    found = fake_quantize(x)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    assert torch.equal(found.view(torch.int32), fake_quantize(x).view(torch.int32))


def test_a_token_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    site, norm = connection(40, torch.float32), RMSNorm(40, 1e-6)
    streams = inputs(4, 3000, 40, dtype=torch.float32)

    def compute(part: Tensor) -> list[Tensor]:
        at = site.collapse(part)
        out = swiglu(norm(at.hidden), at.hidden, 1.0)
        return [at.hidden, at.post.t(), at.residual.permute(2, 0, 1), site.expand(at, out).transpose(0, 1)]

    threads(1)
    whole = compute(streams)
    threads(2)
    for part in (slice(0, 3000), slice(5, 6), slice(13, 1500), slice(2999, 3000)):
        for found, expected in zip(compute(streams[:, part]), whole, strict=True):
            assert torch.equal(found, expected[part])


def test_gradients_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    norm, x = RMSNorm(40, 1e-6), inputs(5000, 40, dtype=torch.float32)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(torch.autograd.grad((norm(x) * x).sum(), norm.weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", SCORING)
def test_affinities_and_their_gradients(scoring: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = inputs(70, 5, dtype=dtype, scale=4.0).requires_grad_()
    agree(*both_ways(lambda: [affinities(logits, scoring)], [logits], monkeypatch))
    edges = torch.tensor([-torch.inf, -1e4, -200.0, 0.0, 200.0], dtype=dtype, requires_grad=True)
    values = affinities(edges, scoring)
    (slopes,) = torch.autograd.grad(values.sum(), edges)
    assert values.isfinite().all() and slopes.isfinite().all() and values[0] == slopes[0] == 0
    whole = affinities(logits, scoring)
    assert all(torch.equal(affinities(row, scoring), expected) for row, expected in zip(logits, whole, strict=True))


def test_other_dtypes_and_devices_are_left_alone() -> None:
    assert not fused.usable(torch.ones(1, dtype=torch.bfloat16))
    assert not fused.usable(torch.ones(1, device="meta"))


def test_new_tokens_read_the_cache_as_it_lies() -> None:
    """Ring by position, entries on pages in any order, -1 picks: against keys that were put in order first."""
    window, per_page, heads, width, tokens = 6, 4, 3, 20, 9
    starts, lengths = torch.tensor([0, 4, 5, 6, 37]), torch.tensor([9, 1, 3, 8, 2])
    slots = torch.tensor([4, 0, 2, 1, 3])
    ring, entries = inputs(5, window, width, seed=1), inputs(12, per_page, width, seed=2)
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:10].view(5, 2)
    visible = (torch.arange(5)[:, None] + torch.arange(tokens)) % 7
    query, own = inputs(5, tokens, heads, width, seed=3), inputs(5, tokens, width, seed=4)
    sinks = inputs(heads, seed=5)
    chosen_by = torch.randint(-1, 8, (5, tokens, 3), generator=torch.Generator().manual_seed(1))
    for picks in (None, chosen_by):
        found = fused.decode_attention(
            query, own, ring, entries, sinks, slots=slots, starts=starts, lengths=lengths, pages=pages, visible=visible,
            picks=picks, most_visible=6,
        )  # fmt: skip
        for b, t in itertools.product(range(5), range(tokens)):
            if t >= lengths[b]:
                assert not found[b, t].any()
                continue
            position, start = int(starts[b]) + t, int(starts[b])
            past = [
                ring[slots[b], p % window] if p < start else own[b, p - start]
                for p in range(max(0, position - window + 1), position + 1)
            ]
            ordered = entries[pages[b]].flatten(0, 1)
            chosen = ordered[: visible[b, t]] if picks is None else ordered[picks[b, t][picks[b, t] >= 0]]
            keys = torch.stack([*past, *chosen])
            logits = torch.cat((sinks[:, None], query[b, t] @ keys.T / width**0.5), 1)
            assert error(found[b, t], logits.softmax(-1)[:, 1:] @ keys) < 1e-12
