"""Products on the CPU: right to float32 rounding, with right gradients, and the same bits in whatever company."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.config import ModelConfig
from opd.fp4 import pack_weights
from opd.kernels import products
from opd.kernels.library import operators
from opd.model import DeepseekV4, new_v4

pytestmark = pytest.mark.skipif(operators() is None, reason="nothing can be compiled here")

SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (12, 16, 32),
    (13, 33, 47),
    (40, 600, 300),
    (33, 1030, 16),
    (3, 128, 500),
    (70, 520, 77),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


def stored(x: Tensor, order: int) -> Tensor:
    """The same matrix in other memory: as it is, transposed, with gaps between rows, with gaps everywhere."""
    match order:
        case 0:
            return x
        case 1:
            return x.mT.contiguous().mT
        case 2:
            return functional.pad(x, (2, 3))[..., 2:-3]
        case _:
            return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_products_are_those_of_float64(rows: int, inner: int, columns: int) -> None:
    a, b = normal(2, rows, inner), normal(2, inner, columns, seed=1)
    exact, scale = a.double() @ b.double(), (a.double().abs() @ b.double().abs()).amax()
    for of_a, of_b in itertools.product(range(4), range(4)):
        found = products.matmul(stored(a, of_a), stored(b, of_b))
        assert (found - exact).abs().amax() < 1e-6 * scale
        assert torch.equal(products.matmul(stored(a[1], of_a), stored(b[1], of_b)), found[1])
        into = functional.pad(torch.ones_like(found), (1, 2), value=torch.nan)
        assert (products.matmul(a, b, into[..., 1:-2], add=True) - 1 - exact).abs().amax() < 1e-6 * scale
        assert into[..., 0].isnan().all() and into[..., -2:].isnan().all()


def test_layers_of_one_input_together_are_those_layers() -> None:
    """Values bit for bit, gradients to rounding, and none for what nobody uses or asks for."""
    layers = [products.Linear(40, width, bias=False) for width in (8, 33, 16, 5)]
    layers[2].weight.requires_grad_(False)
    found = []
    for together in (True, False):
        x = normal(3, 50, 40).requires_grad_()
        outs = products.linears(x, *layers) if together else [layer(x) for layer in layers]
        loss = torch.stack([(out * normal(*out.shape, seed=i)).sum() for i, out in enumerate(outs[:3])]).sum()
        of_x, *of_weights = torch.autograd.grad(
            loss, [x, *(layer.weight for layer in layers if layer.weight.requires_grad)], allow_unused=True
        )
        assert of_weights.pop() is None
        found.append((outs, [of_x, *of_weights]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).abs().amax() < 1e-5 * other.abs().amax()


def test_a_layer_that_is_more_than_a_matrix_does_its_own_part() -> None:
    class Doubled(products.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x, first, second = normal(4, 6), products.Linear(6, 3, bias=False), Doubled(6, 3, bias=False)
    outs = products.linears(x, first, second)
    assert torch.equal(outs[0], first(x)) and torch.equal(outs[1], 2 * products.linear(x, second.weight))


def test_nothing_times_something() -> None:
    assert products.matmul(normal(0, 3), normal(3, 4)).shape == (0, 4)
    assert torch.equal(products.matmul(normal(2, 0), normal(0, 4)), torch.zeros(2, 4))
    assert torch.equal(products.matmul(normal(2, 0), normal(0, 4), torch.ones(2, 4), add=True), torch.ones(2, 4))
    assert products.linear(normal(2, 0, 5), normal(3, 5)).shape == (2, 0, 3)


def test_what_is_not_finite_stays_where_it_is() -> None:
    x, weight = normal(20, 40), normal(50, 40, seed=1)
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    broken = ~products.linear(x, weight).isfinite()
    assert broken[[3, 7]].all() and broken.sum() == 100


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 8, 8), (300, 130, 70), (257, 512, 33), (64, 1100, 200)])
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    rows: int, inner: int, columns: int, threads: Callable[[int], None]
) -> None:
    x, weight = normal(rows, inner), normal(columns, inner, seed=1)
    threads(1)
    whole = products.linear(x, weight)
    rng = random.Random(rows)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(products.linear(x, weight), whole)
        for size in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 100):
            some = torch.tensor(rng.choices(range(rows), k=size))
            assert torch.equal(products.linear(x[some], weight), whole[some])
            assert torch.equal(products.matmul(x[some], weight.t().contiguous()), whole[some])
            into = products.matmul(x[some], weight.t(), torch.ones(size, columns), add=True)
            assert torch.equal(into, products.matmul(x, weight.t(), torch.ones(rows, columns), add=True)[some])
            chosen = torch.tensor(rng.choices(range(columns), k=size))
            assert torch.equal(products.linear(x, weight[chosen]), whole[:, chosen])


def oracle_by_segment(x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return torch.cat([rows @ matrix.t() for rows, matrix in zip(x.split(sizes), weight, strict=True)])


SIZES = (0, 40, 1, 0, 19)


@pytest.mark.parametrize(
    ("function", "oracle", "shapes"),
    [
        (products.linear, lambda x, w: x @ w.t(), ((3, 7, 40), (24, 40))),
        (
            lambda x, w: products.linear_by_segment(x, w, SIZES),
            lambda x, w: oracle_by_segment(x, w, SIZES),
            ((60, 40), (5, 24, 40)),
        ),
        (products.grouped_linear, lambda x, w: torch.einsum("ngk,gfk->ngf", x, w), ((50, 3, 40), (3, 24, 40))),
    ],
    ids=["linear", "by segment", "grouped"],
)
def test_gradients_are_those_of_float64(
    function: Callable[[Tensor, Tensor], Tensor],
    oracle: Callable[[Tensor, Tensor], Tensor],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    inputs = [normal(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(inputs[0], inputs[1]), oracle(exact[0], exact[1])
    weights = normal(*out.shape, seed=9)
    assert (out - expected).abs().amax() < 1e-5
    with torch.no_grad():
        assert torch.equal(function(inputs[0], inputs[1]), out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    for part, whole in zip(found, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert part.shape == whole.shape and (part - whole).abs().amax() < 3e-5
    # A gradient that nobody wants is not computed, and one that comes as a view in another order is read as it is.
    (only,) = torch.autograd.grad((function(inputs[0].detach(), inputs[1]) * weights).sum(), inputs[1:])
    assert torch.equal(only, found[1])
    turned = function(inputs[0], inputs[1]).movedim(0, -1)
    for part, again in zip(found, torch.autograd.grad(turned, inputs, weights.movedim(0, -1)), strict=True):
        assert torch.equal(part, again)


@pytest.mark.parametrize("sizes", [(30, 31), (-1, 62), (61,), (20, 41, 0)])
def test_segments_that_do_not_fit_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="sizes|fit"):
        products.linear_by_segment(normal(60, 4), normal(2, 3, 4), sizes)


def test_shapes_and_types_that_do_not_fit_are_refused_or_left_to_torch() -> None:
    with pytest.raises(RuntimeError, match="do not fit"):
        products.linear(normal(2, 3), normal(4, 5))
    with pytest.raises(RuntimeError, match="do not fit"):
        products.matmul(normal(2, 3), normal(4, 5))
    assert not products.usable(normal(2, 2).double()) and not products.usable(torch.empty(1, device="meta"))
    wide = normal(2, 3).double(), normal(3, 5).double()
    assert torch.equal(products.matmul(*wide, torch.ones(2, 5).double(), add=True), 1 + wide[0] @ wide[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(normal(2, 3), normal(4, 3)).dtype == torch.bfloat16


def test_layers_of_any_model() -> None:
    first, last = nn.Linear(40, 24), nn.Linear(24, 5, bias=False)
    model = nn.Sequential(first, nn.Tanh(), nn.Sequential(last))
    x = normal(70, 40)
    plain = model(x)
    products.use_in(model)
    assert type(first) is type(last) is products.Linear
    assert (model(x) - plain).abs().amax() < 1e-5 and torch.equal(model(x[3:4]), model(x)[3:4])


def policy() -> DeepseekV4:
    """Every kind of layer, experts as packed FP4, MXFP4 index keys, picks from the ninth block on."""
    config = ModelConfig(
        family="deepseek_v4",
        max_tokens=160,
        fp4="experts",
        fp4_index=True,
        config={
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 40,
            "o_groups": 5,
            "o_lora_rank": 24,
            "sliding_window": 16,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "index_n_heads": 3,
            "index_head_dim": 32,
            "index_topk": 8,
            "max_position_embeddings": 160,
        },
    )
    model = new_v4(config, 50, 3)
    pack_weights(model, "experts")
    return model.eval()


@torch.inference_mode()
def test_any_split_of_sequences_into_calls_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    """Alone in one call; then in company, in chunks of any size and token by token, on one thread and on two."""
    model, rng = policy(), random.Random(1)
    lengths = (150, 97, 33, 5)
    sequences = [torch.tensor(rng.choices(range(50), k=length)) for length in lengths]
    threads(1)
    expected = []
    for sequence in sequences:
        cache = model.new_cache(1, 160)
        expected.append(model.extend(sequence[None], cache, cache.extension([0], [0], [len(sequence)]))[0])
    for trial in range(4):
        threads(1 + trial % 2)
        cache, at = model.new_cache(5, 160), [0] * 4
        slots = rng.sample(range(5), 4)
        while any(position < length for position, length in zip(at, lengths, strict=True)):
            going = [i for i in range(4) if at[i] < lengths[i] and rng.random() < 0.8]
            if not going:
                continue
            sizes = [min(lengths[i] - at[i], 1 if trial < 2 else rng.choice((1, 2, 7, 50))) for i in going]
            ids = torch.zeros(len(going), max(sizes), dtype=torch.int64)
            for row, (i, size) in enumerate(zip(going, sizes, strict=True)):
                ids[row, :size] = sequences[i][at[i] : at[i] + size]
            extension = cache.extension([slots[i] for i in going], [at[i] for i in going], sizes)
            hidden = model.extend(ids, cache, extension)
            for row, (i, size) in enumerate(zip(going, sizes, strict=True)):
                assert torch.equal(hidden[row, :size], expected[i][at[i] : at[i] + size]), (trial, i, at[i], size)
                at[i] += size


def test_results_keep_their_memory_whichever_thread_frees_them() -> None:
    """Results take blocks that earlier ones gave back."""

    def work(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        identity, kept = torch.eye(24), list[tuple[Tensor, Tensor]]()
        for size in torch.randint(0, 3000, (300,), generator=generator).tolist():
            x = torch.randn(size, 24, generator=generator)
            kept.append((x, products.linear(x, identity)))
            if size % 3:
                kept.pop(size % len(kept))
        return kept

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for kept in pool.map(work, range(4)):
                assert len(kept) > 50
                for x, y in kept:
                    assert y.data_ptr() % 64 == 0
                    assert torch.equal(x, y)
