"""The compiled choice of the indexer: the stable order of exact scores, however keys are stored and work is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from opd.fp4 import dequantize, fake_quantize, quantize
from opd.kernels import index
from opd.kernels.library import operators
from opd.types import Fp4Tensor

pytestmark = pytest.mark.skipif(operators() is None, reason="no C++ compiler, and no library in the cache")

# rows, queries, heads, channels, keys, picks, keys of a page
CASES = [
    (1, 1, 1, 32, 1, 1, 1),
    (3, 1, 4, 32, 2500, 16, 32),  # a decoding step
    (1, 1, 5, 64, 9000, 700, 4),  # one query, keys in several spans
    (2, 70, 16, 32, 333, 16, 7),  # more queries than a task has
    (1, 130, 3, 20, 300, 5, 300),  # channels that no vector holds
    (2, 9, 2, 8, 600, 50, 8),
    (1, 33, 6, 96, 513, 513, 16),  # as many picks as keys
]
KINDS = ("float32", "bfloat16", "packed")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def slow(query: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> Tensor:
    """Scores in float64, a stable sort, entries in ascending order."""
    products = torch.einsum("bthc,bmc->bthm", query.double(), keys.double()).relu()
    scores = torch.einsum("bth,bthm->btm", weights.double(), products)
    order = scores.masked_fill(torch.arange(keys.shape[1]) >= visible[..., None], -torch.inf)
    best = order.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = best.masked_fill(best >= visible[..., None], 1 << 40).sort(-1).values
    best = torch.nn.functional.pad(best, (0, k - best.shape[-1]), value=1 << 40)
    return best.masked_fill(best == 1 << 40, -1)


def on_pages(keys: Tensor, per_page: int, kind: str) -> tuple[Tensor, Tensor]:
    """Rows as stored, on pages in disorder, and the table; what no key fills is NaN."""
    batch, size, width = keys.shape
    pages = -(-size // per_page)
    table = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages)
    rows = torch.full((batch * pages + 2, per_page, width), torch.nan)
    padded = torch.nn.functional.pad(keys, (0, 0, 0, pages * per_page - size), value=torch.nan)
    rows[table.flatten()] = padded.view(batch * pages, per_page, width)
    match kind:
        case "bfloat16":
            return rows.bfloat16(), table
        case "packed":
            packed = quantize(rows.nan_to_num(0.0))
            scales = packed.scales.masked_fill(rows.isnan().any(-1, keepdim=True), 255)
            return torch.cat((packed.codes, scales), -1), table
        case _:
            return rows, table


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_mxfp4", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_picks_are_a_stable_sort_of_exact_scores(
    case: tuple[int, ...], is_mxfp4: bool, kind: str, threads: Callable[[int], None]
) -> None:
    """Of numbers so round that float32 adds them without rounding, and so few that most scores have an equal."""
    batch, length, heads, width, size, k, per_page = case
    if width % 32 and (is_mxfp4 or kind == "packed"):
        return
    torch.manual_seed(size)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    query, keys = (
        grid[torch.randint(8, shape)] * torch.randint(0, 2, shape).mul(2).sub(1)
        for shape in ((batch, length, heads, width), (batch, size, width))
    )
    if width % 32 == 0:  # a block's scale is that of its largest number
        query, keys = fake_quantize(query * torch.rand(batch, length, heads, 1).round()), fake_quantize(keys)
        steps = torch.randint(-2, 3, (batch, size, width // 32, 1))
        keys = torch.ldexp(keys.unflatten(-1, (-1, 32)), steps).flatten(-2)
    weights = torch.randint(-2, 3, (batch, length, heads)).float()
    visible = torch.randint(0, size + 1, (batch, length)).sort(-1).values
    visible[:, -1] = size
    rows, table = on_pages(keys, per_page, kind)
    for number in (1, 3):
        threads(number)
        assert torch.equal(
            index.pick(query, weights, rows, table, visible, k, is_mxfp4=is_mxfp4),
            slow(query, weights, keys, visible, k),
        )
        if batch == 1:
            continue
        common = visible[:1]
        assert torch.equal(
            index.pick(query, weights, rows, table, common, k, is_mxfp4=is_mxfp4),
            slow(query, weights, keys, common.expand(batch, -1), k),
        )


@pytest.mark.parametrize("is_mxfp4", [False, True])
def test_a_query_chooses_alike_in_any_company(is_mxfp4: bool, threads: Callable[[int], None]) -> None:
    """Alone or among others, from pages or from a tensor, and by whatever number of threads."""
    torch.manual_seed(0)
    query, keys = fake_quantize(torch.randn(1, 150, 8, 64)), fake_quantize(torch.randn(1, 5000, 64))
    weights, visible = torch.randn(1, 150, 8), torch.randint(0, 5001, (1, 150)).sort(-1).values
    rows, table = on_pages(keys, 16, "packed")
    together = index.pick(query, weights, keys, torch.zeros(1, 1, dtype=torch.int64), visible, 20, is_mxfp4=is_mxfp4)
    for number in (1, 4):
        threads(number)
        for t in (0, 63, 64, 149):
            one = slice(t, t + 1)
            alone = index.pick(query[:, one], weights[:, one], rows, table, visible[:, one], 20, is_mxfp4=is_mxfp4)
            assert torch.equal(alone, together[:, one])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 128])
def test_whole_numbers_score_as_floats_do(width: int, kind: str) -> None:
    """Whatever the scales: where the two ways disagree, the scores are as near as rounding is."""
    torch.manual_seed(width)
    query = torch.randn(1, 40, 16, width) * torch.exp2(torch.randint(-20, 20, (1, 40, 16, 1)).float())
    keys = torch.randn(1, 700, width) * torch.exp2(torch.randint(-8, 8, (1, 700, 1)).float())
    query, keys = fake_quantize(query), fake_quantize(keys)
    keys[:, 5] = 0
    weights, visible = torch.randn(1, 40, 16), torch.full((1, 40), 700)
    rows, table = on_pages(keys, 50, kind)
    expected = slow(query, weights, keys, visible, 30)
    products = torch.einsum("bthc,bmc->bthm", query.double(), keys.double()).relu()
    scores = torch.einsum("bth,bthm->btm", weights.double(), products)
    scale = torch.einsum("bth,bthm->btm", weights.double().abs(), products)
    for is_mxfp4 in (False, True):
        found = index.pick(query, weights, rows, table, visible, 30, is_mxfp4=is_mxfp4)
        worst = scores.gather(-1, found).amin(-1) - scores.gather(-1, expected).amin(-1)
        assert bool((worst.abs() <= 1e-6 * scale.gather(-1, expected).amax(-1)).all())
        assert float((found == expected).all(-1).float().mean()) > 0.9


def test_what_is_not_a_number_is_never_chosen() -> None:
    query, weights, visible = torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1), torch.tensor([[4, 4]])
    keys = torch.ones(1, 4, 32)
    keys[0, 1, 7], keys[0, 2, 0] = torch.nan, torch.inf
    table = torch.zeros(1, 1, dtype=torch.int64)
    query[0, 1, 0, 3] = torch.nan
    for is_mxfp4 in (False, True):
        found = index.pick(query, weights, keys, table, visible, 4, is_mxfp4=is_mxfp4)
        assert not {1} & set(found[0, 0].tolist()) and {0, 3} <= set(found[0, 0].tolist())
        assert found[0, 1].tolist() == [-1] * 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, weights, keys = torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3), torch.ones(1, 4, 32)
    table, visible = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1, 5]])
    with pytest.raises(RuntimeError, match="from 0 to the entries of a row"):
        index.pick(query, weights, keys, table, visible, 1, is_mxfp4=False)
    with pytest.raises(RuntimeError, match="rows of another width"):
        index.pick(query, weights, keys[..., :16], table, visible - 1, 1, is_mxfp4=False)
    packed = quantize(keys)
    rows = torch.cat((packed.codes, packed.scales), -1)
    assert torch.equal(dequantize(Fp4Tensor(codes=rows[..., :16], scales=rows[..., 16:], shape=(1, 4, 32))), keys)
    assert index.pick(query, weights, rows, table, visible - 1, 1, is_mxfp4=True).tolist() == [[[-1], [0]]]
    assert not index.usable(query.double(), keys) and not index.usable(query, keys.double())
