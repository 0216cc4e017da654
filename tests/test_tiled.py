"""Compiled attention over tiles against a plain softmax in float64, values and gradients; and bit by bit against itself
on other batches and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.kernels import tiled
from opd.kernels.library import operators

pytestmark = pytest.mark.skipif(operators() is None, reason="no C++ compiler, and no library in the cache")

KINDS = ("window", "prefix", "picks")
# rows, queries, heads, channels, entries, picks, window, past
CASES = [
    (1, 1, 1, 8, 3, 2, 4, 0),
    (2, 1, 4, 32, 200, 16, 32, 32),  # a decoding step
    (3, 45, 6, 20, 12, 3, 5, 4),
    (1, 300, 4, 32, 75, 16, 32, 0),
    (2, 70, 5, 48, 9, 70, 100, 0),  # a window longer than the row; more picks than a chunk has
    (1, 1100, 3, 16, 270, 4, 7, 0),  # more than one part
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(case: tuple[int, ...], kind: str) -> tuple[list[Tensor | None], dict[str, Any]]:
    batch, length, heads, width, num_entries, num_picks, window, past = case
    torch.manual_seed(length)
    query, recent, sinks = (
        torch.randn(batch, length, heads, width),
        torch.randn(batch, past + length, width),
        torch.randn(heads),
    )
    entries = None if kind == "window" else torch.randn(batch, num_entries, width)
    visible = ((torch.arange(length) + 1) * num_entries // length)[None]
    picks = torch.stack([torch.randperm(num_entries)[:num_picks] for _ in range(batch * length)]).view(
        batch, length, -1
    )
    picks = picks.masked_fill((picks >= visible[..., None]) | (torch.rand(picks.shape) < 0.1), -1)
    reach = {
        "first": torch.randint(0, past + 1, (batch,)) if past else None,
        "visible": None if kind == "window" else visible,
        "picks": picks if kind == "picks" else None,
        "window": window,
        "past": past,
    }
    return [query, recent, entries, sinks], reach


def seen(reach: dict[str, Any], recent: Tensor, num_entries: int, length: int) -> Tensor:
    """bool [B, T, sink + recent + entries]."""
    batch, columns = recent.shape[0], torch.arange(recent.shape[1])
    own = torch.arange(length)[:, None] + reach["past"]
    window = ((columns <= own) & (columns > own - reach["window"])).expand(batch, -1, -1)
    if reach["first"] is not None:
        window = window & (columns >= reach["first"][:, None, None])
    parts = [torch.ones(batch, length, 1, dtype=torch.bool), window]
    if reach["picks"] is not None:
        chosen = torch.zeros(batch, length, num_entries + 1, dtype=torch.bool)
        parts.append(chosen.scatter(2, reach["picks"] % (num_entries + 1), True)[..., :-1])
    elif reach["visible"] is not None:
        parts.append((torch.arange(num_entries) < reach["visible"][..., None]).expand(batch, -1, -1))
    return torch.cat(parts, -1)


def slow(query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, **reach: Any) -> Tensor:
    batch, length, heads, width = query.shape
    keys = recent if entries is None else torch.cat((recent, entries), 1)
    logits = torch.einsum("bthc,bsc->bths", query, keys) / width**0.5
    logits = torch.cat((sinks[:, None].expand(batch, length, heads, 1), logits), -1)
    mask = seen(reach, recent, 0 if entries is None else entries.shape[1], length)
    weights = torch.softmax(logits.masked_fill(~mask[:, :, None], -torch.inf), -1)
    return torch.einsum("bths,bsc->bthc", weights[..., 1:], keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_plain_softmax(case: tuple[int, ...], kind: str) -> None:
    tensors, reach = arguments(case, kind)
    found, expected = [], []
    for results, compute, dtype in ((found, tiled.attention, torch.float32), (expected, slow, torch.float64)):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
        query, recent, entries, sinks = leaves
        assert query is not None and recent is not None and sinks is not None
        out = compute(query, recent, entries, sinks, **reach)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, [x for x in leaves if x is not None], torch.randn(out.shape).to(dtype))
        results += [out.detach(), *grads]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


def run(tensors: list[Tensor | None], reach: dict[str, Any]) -> list[Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    out = tiled.attention(*leaves, **reach)  # pyright: ignore[reportArgumentType]
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], out.detach().cos())]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_company_change_no_bit(kind: str, threads: Callable[[int], None]) -> None:
    tensors, reach = arguments((3, 1100, 4, 32, 100, 8, 16, 0), kind)
    threads(1)
    expected = run(tensors, reach)
    threads(4)
    assert all(torch.equal(one, other) for one, other in zip(run(tensors, reach), expected, strict=True))
    alone = [None if x is None else x[1:2] if x.dim() > 1 else x for x in tensors]
    if reach["picks"] is not None:
        reach["picks"] = reach["picks"][1:2]
    for one, other in zip(run(alone, reach)[:-1], expected[:-1], strict=True):  # the sinks' gradient adds up rows
        assert torch.equal(one, other[1:2])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_not_seen_need_not_be_finite(kind: str) -> None:
    (query, recent, entries, sinks), reach = arguments((1, 60, 4, 16, 20, 3, 5, 8), kind)
    assert query is not None and recent is not None and sinks is not None
    expected = tiled.attention(query, recent, entries, sinks, **reach)
    mask = seen(reach, recent, 0 if entries is None else entries.shape[1], 60)[0, :40, 1:].any(0)
    poisoned = recent.clone()
    poisoned[0, ~mask[:68]] = torch.nan
    if entries is not None:
        entries = entries.clone()
        entries[0, ~mask[68:]] = torch.nan
    found = tiled.attention(query, poisoned, entries, sinks, **reach)
    assert torch.equal(found[:, :40], expected[:, :40]) and not found[:, 40:].isfinite().all()


def test_other_dtypes_go_another_way() -> None:
    x = torch.ones(1)
    assert tiled.usable(x, None, x) and not tiled.usable(x, x.double()) and not tiled.usable(x.bfloat16())
