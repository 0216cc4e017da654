"""A step as one compiled call against `DeepseekV4.extend`: every bit, of results and of the cache, and every expert.

Schedules are an engine's: rows come and go, decode and read chunks in one call, at positions of their own. What an
earlier occupant left in the cache is NaN. Which rows a thread takes must not matter, so runs differ in threads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.fp4 import Fp4Experts, pack_weights, quantize_nv
from opd.kernels.library import operators
from opd.model import step
from opd.model.cache import Cache, Layout
from opd.model.step import stepper
from opd.model.transformer import CSA, HCA, DeepseekV4
from tests.test_model import poisoned_cache, random_config, random_model, randomise, tiny

pytestmark = pytest.mark.skipif(operators() is None, reason="nothing is compiled here")
SLOTS, MAX_TOKENS = 7, 64


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Schedule:
    """Parts of random calls that bring every slot's random sequence to its end, and begin others in its place."""

    def __init__(self, model: DeepseekV4, cache: Cache, seed: int, most: int = 12) -> None:
        self.rng, self.vocab, self.cache, self.most = random.Random(seed), model.config.vocab_size, cache, most
        self.ends = [0] * SLOTS

    def rows(self) -> list[list[tuple[int, int, list[int]]]]:
        """Parts of (slot, start, new tokens): decoding rows, rows that read, or both."""
        slots = self.rng.sample(range(SLOTS), self.rng.randint(1, SLOTS))
        cut = self.rng.randint(0, len(slots))
        parts = []
        for part, longest in ((slots[:cut], 1), (slots[cut:], self.most)):
            rows = []
            for slot in part:
                if self.ends[slot] == MAX_TOKENS or self.rng.random() < 0.02:
                    self.ends[slot] = 0
                size = min(self.rng.randint(1, longest), MAX_TOKENS - self.ends[slot])
                rows.append((slot, self.ends[slot], [self.rng.randrange(self.vocab) for _ in range(size)]))
                self.ends[slot] += size
            if rows:
                parts.append(rows)
        return parts


def part_of(cache: Cache, rows: list[tuple[int, int, list[int]]]) -> step.Part:
    slots, starts, tokens = zip(*rows, strict=True)
    at = cache.extension(slots, starts, [len(new) for new in tokens])
    ids = torch.zeros(at.positions.shape, dtype=torch.int64)
    for row, new in enumerate(tokens):
        ids[row, : len(new)] = torch.tensor(new)
    return ids, at


def last_tokens(
    model: DeepseekV4, cache: Cache, parts: list[step.Part], records: Sequence[Tensor] | None = None
) -> Tensor:
    """What `extend` says of each row's last new token."""
    filled = records or [None] * len(parts)
    hidden = [model.extend(ids, cache, at, record) for (ids, at), record in zip(parts, filled, strict=True)]
    return torch.cat([part[range(len(part)), at.lengths - 1] for part, (_, at) in zip(hidden, parts, strict=True)])


def records_of(model: DeepseekV4, parts: list[step.Part]) -> list[Tensor]:
    return [model.new_routing(*ids.shape).fill_(-1) for ids, _ in parts]


def assert_same_experts(parts: list[step.Part], found: list[Tensor], expected: list[Tensor]) -> None:
    for (ids, at), one, other in zip(parts, found, expected, strict=True):
        real = torch.arange(ids.shape[1]) < at.lengths[:, None]
        assert torch.equal(one[real], other[real]) and bool((one[real] >= 0).all())


def assert_same_bits(model: DeepseekV4, seed: int, calls: int, set_threads: Callable[[int], None]) -> None:
    caches = [poisoned_cache(model, SLOTS, MAX_TOKENS) for _ in range(2)]
    assert step._fits(model, caches[0])
    compiled, schedule = stepper(model, caches[0]), Schedule(model, caches[0], seed)
    for call in range(calls):
        rows = schedule.rows()
        parts, same = ([part_of(cache, part) for part in rows] for cache in caches)
        records, wanted = records_of(model, parts), records_of(model, parts)
        is_recorded = call % 5 < 2
        set_threads(1 + call % 3)
        found = compiled(parts, records if is_recorded else ())
        set_threads(1)
        expected = last_tokens(model, caches[1], same, wanted)
        assert torch.equal(found, expected), (call, rows)
        if is_recorded:
            assert_same_experts(parts, records, wanted)
    for slot in range(SLOTS):
        pair = (cache.snapshot(slot) for cache in caches)
        for one, other in zip(*pair, strict=True):
            assert one.view(torch.uint8).equal(other.view(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(16))
def test_a_step_is_extend_bit_for_bit(seed: int, threads: Callable[[int], None]) -> None:
    """Any schedule of layers, routing, scoring and ratios; experts as numbers."""
    config = random_config(seed)
    config.hc_mult = 4
    assert_same_bits(random_model(config, seed), seed, 40, threads)


def wide(fp4: str, fp4_index: bool, seed: int, **changes: Any) -> DeepseekV4:
    """Widths that divide into blocks of 32, as FP4 needs them."""
    config = tiny(hidden_size=64, moe_intermediate_size=32, index_head_dim=32, hc_mult=4, **changes)
    model = DeepseekV4(config, fp4, fp4_index)
    randomise(model, seed)
    pack_weights(model, fp4)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("fp4", "fp4_index"), [("experts", True), ("experts", False), ("none", True)])
def test_packed_experts_and_rounded_index_keys(fp4: str, fp4_index: bool, threads: Callable[[int], None]) -> None:
    model = wide(fp4, fp4_index, 3, index_topk=2, n_routed_experts=6, num_experts_per_tok=5)
    assert_same_bits(model, 1, 60, threads)


@torch.no_grad()
def test_many_tokens_and_one_long_row(threads: Callable[[int], None]) -> None:
    """More tokens than a thread takes at once, and a row that outweighs all others, whose products threads share."""
    model = wide("experts", True, 5, max_position_embeddings=1024)
    threads(2)
    for sizes in ([150, 149, 30, 150, 1, 77], [600, 3, 1], [1] * 6):
        caches = [model.new_cache(6, 700) for _ in range(2)]
        tokens = torch.randint(model.config.vocab_size, (6, max(sizes)))
        rows = [(slot, 0, tokens[slot, :size].tolist()) for slot, size in enumerate(sizes)]
        part = part_of(caches[0], rows)
        records, wanted = records_of(model, [part]), records_of(model, [part])
        found = stepper(model, caches[0])([part], records)
        assert torch.equal(found, last_tokens(model, caches[1], [part_of(caches[1], rows)], wanted))
        assert_same_experts([part], records, wanted)


@torch.no_grad()
def test_what_is_not_compiled_takes_the_other_way() -> None:
    """Another dtype, another number of streams, a packed cache, NVFP4, experts that `extend` rounds first."""
    packed: Layout = "packed"
    unrounded = DeepseekV4(tiny(hidden_size=64, moe_intermediate_size=32, hc_mult=4), "experts")
    randomise(unrounded, 0)
    nv = wide("none", False, 2)
    experts = nv.blocks[0].mlp.experts
    weight = experts.gate_up_proj
    del experts.gate_up_proj
    experts.add_module("gate_up_proj", Fp4Experts(quantize_nv(cast(Tensor, weight).detach())))
    cases = [
        (random_model(tiny(hc_mult=4)).double(), None),
        (random_model(tiny(hc_mult=3)), None),
        (wide("none", False, 1), packed),
        (unrounded, None),
        (nv, None),
    ]
    for model, layout in cases:
        caches = [model.new_cache(3, 40, layout=layout or "plain") for _ in range(2)]
        assert not step._fits(model, caches[0])
        rows = [[(0, 0, [1]), (2, 0, [3])], [(1, 0, [4, 5, 6])]]
        parts = [part_of(caches[0], part) for part in rows]
        records, wanted = records_of(model, parts), records_of(model, parts)
        found = stepper(model, caches[0])(parts, records)
        assert torch.equal(found, last_tokens(model, caches[1], [part_of(caches[1], part) for part in rows], wanted))
        assert_same_experts(parts, records, wanted)


@torch.no_grad()
def test_a_step_keeps_the_weights_it_was_made_with() -> None:
    model = wide("experts", False, 4, layer_types=[CSA, HCA], mlp_layer_types=["moe", "moe"], num_hidden_layers=2)
    cache = model.new_cache(1, 20)

    def first(extend: step.Extend) -> Tensor:
        return extend([part_of(cache, [(0, 0, [1, 2, 3])])])

    old = stepper(model, cache)
    pack = model.blocks[1].mlp.experts.down_proj
    assert isinstance(pack, Fp4Experts)
    published = pack.packed()
    published.codes.copy_(torch.from_numpy(np.flip(published.codes.numpy(), 1).copy()))
    kept = first(old)
    pack.load(published)
    assert torch.equal(first(old), kept)
    assert not torch.equal(first(stepper(model, cache)), kept)


def test_errors_name_what_is_missing() -> None:
    model = wide("none", False, 0)
    cache = model.new_cache(1, 20)
    tensors = step._tensors(model.blocks[0], cache.layers[0])
    del tensors["self_attn.sinks"]
    made = step._compiled(model, cache)
    with pytest.raises(RuntimeError, match="a step needs self_attn.sinks"):
        made.add_layer(tensors, {"hc_iterations": 1}, {"eps": 1e-6, "hc_eps": 1e-6}, model.main_frequencies)
