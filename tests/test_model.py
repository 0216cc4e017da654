"""DeepSeek-V4: the same numbers as transformers and as a slow oracle, whole or in pieces, and the paper's invariants.

Every comparison runs on weights that are all random, since the zeros and ones of a fresh model hide swapped and missing
terms. The indexer has 64 heads: with few of them many index scores are exactly zero, and ties say nothing about
equality.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM, LlamaConfig, LlamaForCausalLM

import opd.model.attention
import opd.model.indexer
import opd.model.sparse
from opd.config import ConfigError, ModelConfig
from opd.fp4 import fake_quantize
from opd.model import DeepseekV4, load_model, new_v4
from opd.model.attention import Attention, Compressor
from opd.model.cache import Cache, Layout
from opd.model.hyper_connection import HyperConnection, HyperHead, sinkhorn
from opd.model.indexer import hadamard, index_scores
from opd.model.layers import (
    GroupedLinear,
    RMSNorm,
    linear_by_segment,
    rope_frequencies,
    rope_rotation,
    rotate,
    swiglu,
    unit_rms,
)
from opd.model.moe import Router, affinities, balance_statistics
from opd.model.sparse import Reach, entry_shares, sparse_attention, top_entries
from opd.model.transformer import CSA, HCA, WINDOW_ONLY, check_v4_config, initialize, num_parameters, v4_config
from opd.weights import apply_snapshot, save_checkpoint, snapshot_of
from tests import oracles

TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25,
    "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "layer_types": [WINDOW_ONLY, CSA, HCA, CSA], "compress_rates": {CSA: 4, HCA: 8},
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "index_n_heads": 64, "index_head_dim": 8, "index_topk": 2,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 256,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 1,
}  # fmt: skip
SEEDS = range(24)
TOLERANCE = 3e-5  # of float32, at logits of a few units


def tiny(**changes: Any) -> Any:
    """A DeepseekV4Config (whose annotations allow fewer values than its fields hold)."""
    return v4_config({**TINY, **changes})


def random_config(seed: int) -> Any:
    """Any schedule that works: each kind of layer is in two configs of three, ratios reach the window's size."""
    rng = random.Random(seed)
    kinds = [WINDOW_ONLY, CSA, HCA]
    layer_types = rng.choices(kinds, k=rng.randint(1, 2)) + kinds[: rng.choice([1, 3, 3])]
    rng.shuffle(layer_types)
    window = rng.randint(4, 12)
    heads = rng.choice([2, 4, 8])
    head_dim, factor = rng.choice([(16, 0.25), (16, 0.5), (8, 1.0), (24, 0.25)])
    experts = rng.choice([4, 7])
    yarn = {**YARN, "factor": rng.choice([2.0, 16.0]), "beta_fast": rng.choice([2, 32])}
    return tiny(
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        mlp_layer_types=rng.choices(["hash_moe", "moe", "moe"], k=len(layer_types)),
        sliding_window=window,
        compress_rates={CSA: rng.choice([1, 2, 3, 4, window]), HCA: rng.randint(2, window)},
        num_attention_heads=heads,
        o_groups=rng.choice([group for group in (1, 2, 4) if heads % group == 0]),
        head_dim=head_dim,
        partial_rotary_factor=factor,
        index_topk=rng.choice([1, 2, 3, 100]),
        n_routed_experts=experts,
        num_experts_per_tok=rng.choice([1, 2, 3, experts]),
        scoring_func=rng.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"]),
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        swiglu_limit=rng.choice([0.7, 10.0]),
        hc_mult=1 + seed % 4,
        hc_sinkhorn_iters=rng.choice([1, 2, 20]),
        hc_eps=rng.choice([1e-6, 1e-2]),
        rms_norm_eps=rng.choice([1e-6, 1e-2]),
        rope_parameters=rng.choice([None, yarn, yarn]),
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter and persistent buffer: matrices keep a unit RMS, vectors are of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            order = torch.rand(
                len(tensor), int(model.get_parameter(name[:-7] + "weight").shape[0]), generator=generator
            )
            tensor.copy_(order.argsort(-1)[:, : tensor.shape[1]])
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.3 * noise)
        elif tensor.ndim == 1 or name.endswith(("position_bias", "embed_tokens.weight")):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)


def random_model(config: Any, seed: int = 0) -> DeepseekV4:
    model = DeepseekV4(config)
    randomise(model, seed)
    return model


def random_rows(config: Any, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens in every place, so padding is a random id too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (len(lengths), max(lengths)), generator=generator), torch.tensor(lengths)


def layers_of(model: DeepseekV4) -> list[Any]:
    return list(model.model.layers)


def logits_of(model: DeepseekV4, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    if lengths is None:
        lengths = torch.full((len(tokens),), tokens.shape[1])
    return model(tokens, lengths).hidden @ model.head.T


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_values_and_gradients_are_those_of_transformers(seed: int) -> None:
    config = random_config(seed)
    ours = random_model(config, seed)
    theirs = DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    theirs.load_state_dict(ours.state_dict())
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40), rng.randint(25, 40)]
    tokens, lengths_B = random_rows(config, lengths, seed)
    mask = torch.arange(tokens.shape[1]) < lengths_B[:, None]

    found = logits_of(ours, tokens, lengths_B)[mask]
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits[mask]
    assert 1 < float(expected.detach().abs().max()) < 12
    assert error(found, expected) < TOLERANCE

    projection = torch.randn_like(expected)
    (found * projection).sum().backward()
    (expected * projection).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(grad.norm()) for grad in gradients.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        expected_grad = gradients[name]
        if expected_grad is None or parameter.grad is None:  # the indexer: a choice has no gradient
            assert expected_grad is None or not expected_grad.any(), name
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # Where the exact gradient is zero (one stream's scale before a norm), both hold the rounding of larger ones.
        scale = float(expected_grad.norm()) + 5e-3 * largest
        assert float((parameter.grad - expected_grad).norm()) <= 1e-4 * scale, name


def test_random_configs_cover_what_differs() -> None:
    configs = [random_config(seed) for seed in SEEDS]
    layers = {pair for config in configs for pair in zip(config.layer_types, config.mlp_layer_types, strict=True)}
    assert len(layers) == 6
    assert {config.hc_mult for config in configs} == {1, 2, 3, 4}
    assert {config.rope_parameters["compress"]["rope_type"] for config in configs} == {"default", "yarn"}
    assert {config.o_groups for config in configs} == {1, 2, 4}
    assert any(config.compress_rates[HCA] == config.sliding_window for config in configs)


@pytest.mark.parametrize("fast", [1, 4, 32, 64])
def test_rope_frequencies(fast: int) -> None:
    for theta, original, factor in ((1e4, 64, 4.0), (160000.0, 65536, 16.0), (100.0, 4096, 2.0)):
        parameters = {"rope_theta": theta, "rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": 1}
        parameters["original_max_position_embeddings"] = original
        for kind in ("yarn", "default"):
            parameters["rope_type"] = kind
            expected = torch.tensor(oracles.rope_frequencies(parameters, 64))
            assert torch.allclose(rope_frequencies(parameters, 64), expected, rtol=1e-5, atol=0)


# ---- the slow oracle, in float64 -------------------------------------------------------------------------------------


def double_model(config: Any, seed: int) -> DeepseekV4:
    """A float64 model with the oracle's frequencies, since float32's last bit grows with the position."""
    model = random_model(config, seed).double()
    for kind in ("main", "compress"):
        model.get_buffer(f"{kind}_frequencies").copy_(
            torch.tensor(
                oracles.rope_frequencies(config.rope_parameters[kind], config.qk_rope_head_dim), dtype=torch.float64
            )
        )
    return model


@pytest.mark.parametrize(
    ("layer_types", "changes"),
    [
        ([WINDOW_ONLY, WINDOW_ONLY], {"hc_mult": 3, "scoring_func": "sigmoid"}),
        ([CSA, CSA], {"index_topk": 2, "swiglu_limit": 0.7}),
        ([CSA, HCA], {"index_topk": 100, "hc_eps": 1e-2, "rms_norm_eps": 1e-2, "num_experts_per_tok": 3}),
        ([WINDOW_ONLY, CSA, HCA], {"compress_rates": {CSA: 3, HCA: 6}, "sliding_window": 6, "o_groups": 4}),
    ],
)
@torch.no_grad()
def test_float64_forward_is_the_oracle(layer_types: list[str], changes: dict[str, Any]) -> None:
    config = tiny(
        **{"vocab_size": 20, "layer_types": layer_types, "num_hidden_layers": len(layer_types), "index_n_heads": 16,
           "mlp_layer_types": ["moe"] * (len(layer_types) - 1) + ["hash_moe"], "rope_parameters": dict(YARN), **changes}
    )  # fmt: skip
    model = double_model(config, 1)
    lengths = [7, 20]
    tokens, lengths_B = random_rows(config, lengths, 1)
    output = model(tokens, lengths_B)
    loads = torch.zeros_like(output.expert_load)
    balances = torch.zeros(len(loads), dtype=torch.float64)
    for row, length in enumerate(lengths):
        hidden, balance, load = oracles.v4_forward(config, model.state_dict(), tokens[row, :length].tolist())
        assert error(output.hidden[row, :length], hidden) < 1e-9
        balances += torch.tensor(balance, dtype=torch.float64)
        loads += torch.tensor(load)
    assert torch.equal(output.expert_load, loads)
    assert math.isclose(float(output.balance_loss), float(balances.mean()), rel_tol=1e-9)


# ---- batches, causality ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_padded_row_is_the_row_alone() -> None:
    model = random_model(tiny())
    lengths = [1, 3, 4, 5, 7, 8, 9, 40]
    tokens, lengths_B = random_rows(model.config, lengths)
    hidden = model(tokens, lengths_B).hidden
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length], torch.tensor([length])).hidden
        assert error(hidden[row, :length], alone[0]) < 1e-5


@torch.no_grad()
def test_padding_counts_neither_as_load_nor_as_balance() -> None:
    model = random_model(tiny()).double()
    lengths = [5, 17]
    tokens, lengths_B = random_rows(model.config, lengths)
    both = model(tokens, lengths_B)
    alone = [model(tokens[row : row + 1, :n], torch.tensor([n])) for row, n in enumerate(lengths)]
    assert torch.equal(both.expert_load, alone[0].expert_load + alone[1].expert_load)
    assert both.expert_load.sum(1).tolist() == [2 * 22] * 3
    assert math.isclose(float(both.balance_loss), sum(float(one.balance_loss) for one in alone), rel_tol=1e-9)


@pytest.mark.parametrize("experts_per_token", [2, 6])
@torch.no_grad()
def test_the_future_never_reaches_the_past(experts_per_token: int) -> None:
    """To the bit if every expert gets every token; else a later token changes how many rows an expert multiplies at
    once, which may change the last bit of each."""
    model = random_model(tiny(num_experts_per_tok=experts_per_token)).double()
    tokens, lengths_B = random_rows(model.config, [33])
    before = model(tokens, lengths_B).hidden[0]
    for changed in range(33):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % model.config.vocab_size
        after = model(other, lengths_B).hidden[0]
        if changed:
            assert error(after[:changed], before[:changed]) <= (0 if experts_per_token == 6 else 1e-12)
        assert error(after[changed], before[changed]) > 1e-3


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused() -> None:
    model = random_model(tiny(max_position_embeddings=16))
    model(*random_rows(model.config, [16]))
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings=16"):
        model(*random_rows(model.config, [17]))


# ---- decoding with a cache -------------------------------------------------------------------------------------------


def poisoned_cache(
    model: DeepseekV4, num_slots: int, max_tokens: int, num_pages: int | None = None, layout: Layout = "plain"
) -> Cache:
    """Nothing that an earlier occupant left may be read: here every number it left is NaN, which byte 255 is in E4M3
    and UE8M0 and, twice, in BF16."""
    cache = model.new_cache(num_slots, max_tokens, num_pages, layout)
    for layer in cache.layers:
        for tensor in (*layer.per_slot(), *layer.paged()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    return cache


def extend(model: DeepseekV4, cache: Cache, rows: list[tuple[int, int, Tensor]], padding: int = 0) -> list[Tensor]:
    """Hidden states of each row (slot, start, new tokens), in one call with `padding` more columns than needed."""
    lengths = [len(tokens) for _, _, tokens in rows]
    width = max(lengths) + padding
    token_ids = torch.randint(model.config.vocab_size, (len(rows), width))
    for row, (_, _, tokens) in enumerate(rows):
        token_ids[row, : len(tokens)] = tokens
    at = cache.extension([slot for slot, _, _ in rows], [start for _, start, _ in rows], lengths, width)
    hidden = model.extend(token_ids, cache, at)
    return [hidden[row, : len(tokens)] for row, (_, _, tokens) in enumerate(rows)]


def run_in_pieces(
    model: DeepseekV4,
    cache: Cache,
    sequences: dict[int, Tensor],
    rng: random.Random,
    done: dict[int, int] | None = None,
) -> dict[int, Tensor]:
    """Brings each slot's sequence to its end: any slots in any order in each call, with any number of new tokens.

    `done` says how many tokens of a slot's sequence the cache already holds.
    """
    at = {slot: (done or {}).get(slot, 0) for slot in sequences}
    pieces: dict[int, list[Tensor]] = {slot: [] for slot in sequences}
    while unfinished := [slot for slot in sequences if at[slot] < len(sequences[slot])]:
        rows = []
        decoding = rng.random() < 0.5
        for slot in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            left = len(sequences[slot]) - at[slot]
            size = 1 if decoding else min(left, rng.choice([1, 2, 3, 4, 5, 8, 9, 13, 30]))
            rows.append((slot, at[slot], sequences[slot][at[slot] : at[slot] + size]))
        padding = 0 if decoding else rng.choice([0, 0, 1, 9])
        for (slot, _, tokens), hidden in zip(rows, extend(model, cache, rows, padding), strict=True):
            pieces[slot].append(hidden)
            at[slot] += len(tokens)
    return {slot: torch.cat(hidden) for slot, hidden in pieces.items()}


def alone(model: DeepseekV4, tokens: Tensor) -> Tensor:
    return model(tokens[None], torch.tensor([len(tokens)])).hidden[0]


def edge_lengths(config: Any) -> list[int]:
    """One token, and one less and one more than a block of each kind."""
    return [
        1,
        *(rate + change for rate in config.compress_rates.values() for change in (-1, 0, 1) if rate + change > 0),
    ]


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_any_chunking_is_the_whole_sequence(seed: int) -> None:
    model = random_model(random_config(seed), seed)
    rng = random.Random(seed)
    lengths = [*edge_lengths(model.config), 37, 50, rng.randint(20, 50)]
    slots = rng.sample(range(len(lengths) + 3), len(lengths))
    cache = poisoned_cache(model, len(lengths) + 3, 50)
    for _ in range(2):  # the second time, slots hold what other sequences left
        rng.shuffle(lengths)
        sequences = {
            slot: torch.tensor(rng.choices(range(model.config.vocab_size), k=length))
            for slot, length in zip(slots, lengths, strict=True)
        }
        for slot, hidden in run_in_pieces(model, cache, sequences, rng).items():
            assert error(hidden, alone(model, sequences[slot])) < TOLERANCE


@torch.no_grad()
def test_token_by_token_and_in_float64_too() -> None:
    model = random_model(tiny()).double()
    sequences = {slot: torch.randint(40, (35 + slot,)) for slot in range(3)}
    cache = poisoned_cache(model, 3, 37)
    pieces: list[list[Tensor]] = [[], [], []]
    for t in range(37):
        rows = [(slot, t, tokens[t : t + 1]) for slot, tokens in sequences.items() if t < len(tokens)]
        for (slot, _, _), hidden in zip(rows, extend(model, cache, rows), strict=True):
            pieces[slot].append(hidden)
    for slot, tokens in sequences.items():
        assert error(torch.cat(pieces[slot]), alone(model, tokens)) < 1e-10


@pytest.mark.parametrize("prefix", [1, 3, 4, 7, 8, 9, 18])
@torch.no_grad()
def test_a_copied_slot_goes_its_own_way(prefix: int) -> None:
    model = random_model(tiny())
    rng = random.Random(prefix)
    cache = poisoned_cache(model, 6, 45)
    prompt = torch.randint(40, (prefix,))
    other = torch.randint(40, (21,))
    run_in_pieces(model, cache, {4: prompt, 2: other}, rng)
    cache.fork([4, 2, 4], [1, 0, 5])
    sequences = {slot: torch.cat((prompt, torch.randint(40, (rng.randint(9, 27),)))) for slot in (4, 1, 5)}
    sequences |= {slot: torch.cat((other, torch.randint(40, (11,)))) for slot in (2, 0)}
    done = {4: prefix, 1: prefix, 5: prefix, 2: 21, 0: 21}
    for slot, hidden in run_in_pieces(model, cache, sequences, rng, done).items():
        assert error(hidden, alone(model, sequences[slot])[done[slot] :]) < TOLERANCE


def test_a_cache_has_one_size_and_refuses_longer_sequences() -> None:
    config = tiny()
    model = random_model(config)
    cache = model.new_cache(num_slots=3, max_tokens=17)  # pages of 8 tokens, three for each slot
    width, index_width = config.head_dim, config.index_head_dim
    csa = 2 * (2 * 4) * 2 * (width + index_width) + 3 * (8 // 4) * (width + index_width)  # two rings, then entries
    hca = 2 * 8 * width + 3 * (8 // 8) * width
    assert cache.num_bytes() == 3 * 4 * (4 * 8 * width + 2 * csa + hca)
    extend(model, cache, [(1, 0, torch.arange(17))])
    with pytest.raises(ValueError, match="18 tokens does not fit a cache of 17"):
        extend(model, cache, [(1, 17, torch.arange(1))])
    layers = model.bfloat16().new_cache(1, 8).layers
    assert {tensor.dtype for layer in layers for tensor in (*layer.per_slot(), *layer.paged())} == {torch.bfloat16}


# ---- attention -------------------------------------------------------------------------------------------------------


def one_attention(kind: str, **changes: Any) -> tuple[Attention, Tensor]:
    """A float64 attention layer of one kind, all random, and its layer's frequencies."""
    model = random_model(tiny(**{"num_hidden_layers": 1, "layer_types": [kind], "mlp_layer_types": ["moe"], **changes}))
    model.double()
    frequencies = model.get_buffer("main_frequencies" if kind == WINDOW_ONLY else "compress_frequencies")
    return layers_of(model)[0].self_attn, frequencies


def run_attention(attention: Attention, frequencies: Tensor, h: Tensor, shift: int = 0) -> Tensor:
    positions = torch.arange(h.shape[1]) + shift
    return attention(h, rope_rotation(positions, frequencies)[None], frequencies)[0]


def compressor_of(attention: Attention) -> Compressor:
    assert attention.compressor is not None
    return attention.compressor


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "ratio"), [(CSA, 4), (HCA, 8), (CSA, 1), (HCA, 2)])
@torch.no_grad()
def test_the_last_token_of_a_block_is_the_first_to_see_it(kind: str, ratio: int) -> None:
    attention, frequencies = one_attention(kind, compress_rates={CSA: 4, HCA: 8, kind: ratio}, index_topk=100)
    h = inputs(1, 3 * ratio, 32)
    before = run_attention(attention, frequencies, h)
    compressor_of(attention).kv_norm.weight.mul_(2)
    changed = (run_attention(attention, frequencies, h) != before).any(-1)[0]
    assert changed.tolist() == [t >= ratio - 1 for t in range(3 * ratio)]


@pytest.mark.parametrize(("kind", "ratio"), [(CSA, 4), (HCA, 8)])
@torch.no_grad()
def test_an_entry_depends_on_its_own_tokens_only(kind: str, ratio: int) -> None:
    attention, frequencies = one_attention(kind)
    compressor = compressor_of(attention)
    h = inputs(1, 4 * ratio + 3, 32)
    before = compressor.compress(h, frequencies)
    assert before.shape[1] == 4
    for changed in range(4 * ratio + 3):
        other = h.clone()
        other[0, changed] += 1
        differs = (compressor.compress(other, frequencies) != before).any(-1)[0].tolist()
        own = changed // ratio
        assert differs == [block == own or (kind == CSA and block == own + 1) for block in range(4)]
    for length in range(ratio, 4 * ratio + 3):
        entries = compressor.compress(h[:, :length], frequencies)
        assert entries.shape[1] == length // ratio
        assert error(entries, before[:, : length // ratio]) < 1e-12


@pytest.mark.parametrize(("kind", "ratio"), [(CSA, 4), (HCA, 8)])
@torch.no_grad()
def test_zero_gates_average_the_candidates(kind: str, ratio: int) -> None:
    attention, frequencies = one_attention(kind)
    compressor = compressor_of(attention)
    compressor.gate_proj.weight.zero_()
    compressor.position_bias.zero_()
    h = inputs(1, 4 * ratio, 32)
    kv = compressor.kv_proj(h)[0].view(4, ratio, -1)
    entries = compressor.compress(h, frequencies)[0]
    for block in range(4):
        candidates = kv[block, :, -16:]
        if kind == CSA and block > 0:
            candidates = torch.cat((candidates, kv[block - 1, :, :16]))
        assert len(candidates) == (8 if block or kind == HCA else 4)
        rotation = rope_rotation(torch.tensor(block * ratio), frequencies)
        assert error(entries[block], rotate(compressor.kv_norm(candidates.mean(0)), rotation)) < 1e-12


@pytest.mark.parametrize("kind", [WINDOW_ONLY, CSA, HCA])
@torch.no_grad()
def test_norms_bound_every_attention_logit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, frequencies = one_attention(kind)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, reach: Reach) -> Tensor:
        seen.append((query, recent if entries is None else torch.cat((recent, entries), 1)))
        return sparse_attention(query, recent, entries, sinks, reach)

    monkeypatch.setattr(opd.model.attention, "sparse_attention", spy)
    run_attention(attention, frequencies, 3 * inputs(2, 24, 32))
    ((query, keys),) = seen
    assert torch.allclose(query.norm(dim=-1), torch.tensor(16.0).double().sqrt(), rtol=1e-4)
    norms = [attention.kv_norm] if kind == WINDOW_ONLY else [attention.kv_norm, compressor_of(attention).kv_norm]
    for part, norm in zip(keys.split([24, keys.shape[1] - 24], dim=1), norms, strict=False):
        assert float(part.norm(dim=-1).max()) <= 4 * float(norm.weight.abs().max()) * (1 + 1e-6)


@torch.no_grad()
def test_only_distances_matter() -> None:
    """In a window-only layer; entries of the others are placed from position 0, so that a shift of all positions can
    not be asked for. There, the oracle is what finds a missing or wrong rotation."""
    attention, frequencies = one_attention(WINDOW_ONLY)
    h = inputs(1, 30, 32)
    assert error(run_attention(attention, frequencies, h, 96), run_attention(attention, frequencies, h)) < 1e-4
    assert error(run_attention(attention, 0 * frequencies, h), run_attention(attention, frequencies, h)) > 1e-2


def test_rotation() -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    x = torch.randn(5, 4, 10)
    rotation = rope_rotation(torch.arange(5), frequencies)[:, None]
    turned = rotate(x, rotation)
    assert torch.equal(turned[..., :4], x[..., :4])
    assert error(rotate(turned, rotation.conj()), x) < 1e-6
    for position in range(5):
        expected = oracles.turn(x[position, 2].double(), position, frequencies.tolist())
        assert error(turned[position, 2], expected) < 1e-6
    assert rotate(x.bfloat16(), rotation).dtype == torch.bfloat16
    assert rotate(x[..., :6], rotation).shape == (5, 4, 6)


def test_the_sink_takes_probability_and_adds_nothing() -> None:
    query, recent = inputs(2, 9, 2, 6), inputs(2, 9, 6)
    recent[..., 0] = 1.0  # so channel 0 of the output is the sum of the probabilities
    reach = Reach(window=4)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    logits = torch.einsum("bthc,bsc->bths", query, recent) / math.sqrt(6)
    logits = logits.masked_fill(~((distance >= 0) & (distance < 4))[:, None], -torch.inf)
    plain = torch.softmax(logits, -1) @ recent[:, None]
    never = torch.full((2,), -torch.inf, dtype=torch.float64)
    assert error(sparse_attention(query, recent, None, never, reach), plain) < 1e-12
    assert sparse_attention(query, recent, None, -never.clamp(-1e4, 1e4), reach).abs().max() < 1e-12
    sinks = inputs(2)
    out = sparse_attention(query, recent, None, sinks, reach)
    assert error(out[..., 0], torch.sigmoid(logits.logsumexp(-1) - sinks)) < 1e-12
    assert error(out, plain * out[..., :1]) < 1e-12


@torch.no_grad()
def test_enough_picks_make_sparse_attention_dense() -> None:
    attention, frequencies = one_attention(CSA, index_topk=5)
    indexer: Any = compressor_of(attention).indexer
    h = inputs(2, 26, 32)  # six blocks
    rotation = rope_rotation(torch.arange(26), frequencies)[None]
    visible = ((torch.arange(26) + 1) // 4).expand(2, -1)
    keys, latent = indexer.compress(h, frequencies), inputs(2, 26, 24)
    sparse = run_attention(attention, frequencies, h)
    for topk in (6, 100):
        indexer.topk = topk
        picks = indexer.pick(h, latent, keys, visible, rotation)
        assert [set(row.tolist()) - {-1} for row in picks[0]] == [set(range(seen)) for seen in visible[0].tolist()]
    dense = run_attention(attention, frequencies, h)
    assert error(sparse[:, :23], dense[:, :23]) < 1e-12  # only the last block's end has more than five to choose from
    assert float((sparse[:, 23:] - dense[:, 23:]).abs().amax(-1).min()) > 1e-6
    indexer.topk = 2
    picks = indexer.pick(h, latent, keys, visible, rotation)
    assert torch.equal((picks >= 0).sum(-1), visible.clamp(max=2))


@torch.no_grad()
def test_equal_index_scores_go_to_the_lower_block() -> None:
    attention, frequencies = one_attention(CSA, index_topk=2)
    indexer: Any = compressor_of(attention).indexer
    indexer.scorer.weights_proj.weight.zero_()
    rotation = rope_rotation(torch.arange(24), frequencies)[None]
    visible = ((torch.arange(24) + 1) // 4)[None]
    picks = indexer.pick(inputs(1, 24, 32), inputs(1, 24, 24), inputs(1, 6, 8), visible, rotation)
    assert [sorted(row) for row in picks[0].tolist()] == [
        sorted([i if i < seen else -1 for i in range(2)]) for seen in visible[0].tolist()
    ]


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_top_entries_is_a_stable_sort(k: int) -> None:
    """Few distinct scores: nearly every row has its last place contested."""
    torch.manual_seed(k)
    scores = torch.randint(0, 4, (50, 3, 20)).float()
    scores[torch.rand(scores.shape) < 0.3] = -torch.inf
    scores[0] = -torch.inf
    picks = top_entries(scores, k)
    best = scores.sort(dim=-1, descending=True, stable=True)
    rows = [x.flatten(0, 1).tolist() for x in (picks, best.indices, best.values)]
    for got, order, value in zip(*rows, strict=True):
        expected = {i for i, v in zip(order[:k], value[:k], strict=True) if v > -math.inf}
        assert {i for i in got if i >= 0} == expected
        assert len([i for i in got if i >= 0]) == len(expected)
        if k < 20:
            assert all(i >= 0 for i in got[: len(expected)])  # real picks first


def slow_attention(
    query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, window: int, past: int, sees: Any
) -> Tensor:
    """Query by query and head by head: window, the entries `sees(b, t)` names, the sink."""
    rows = []
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            keys = [recent[b, s] for s in range(max(0, past + t - window + 1), past + t + 1)]
            keys += [] if entries is None else [entries[b, i] for i in sees(b, t)]
            stacked = torch.stack(keys)
            for head in range(query.shape[2]):
                logits = torch.cat((stacked @ query[b, t, head] / query.shape[-1] ** 0.5, sinks[head : head + 1]))
                rows.append(torch.softmax(logits, 0)[:-1] @ stacked)
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["window", "prefix", "picks"])
@pytest.mark.parametrize(("block", "past"), [(128, 0), (5, 0), (1, 0), (3, 4)])
def test_blocked_attention_and_its_gradient_are_the_slow_ones(
    kind: str, block: int, past: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd.model.sparse, "QUERY_BLOCK", block)
    if not keep:
        monkeypatch.setattr(opd.model.sparse, "KEPT_ELEMENTS", 0)
    torch.manual_seed(block)
    query, recent, sinks = inputs(2, 13, 3, 6), inputs(2, past + 13, 6), inputs(3)
    entries = None if kind == "window" else inputs(2, 4, 6)
    reach = Reach(window=4, past=past)
    visible = (torch.arange(13) + past + 1) // 3
    visible = visible.clamp(max=4)[None]
    picks = torch.stack([torch.randperm(4)[:2] for _ in range(26)]).view(2, 13, 2)
    picks = picks.masked_fill(picks >= visible[..., None], -1)
    if kind == "prefix":
        reach = reach._replace(visible=visible, ratio=3, base=past)
    if kind == "picks":
        reach = reach._replace(visible=visible, picks=picks)

    def sees(b: int, t: int) -> list[int]:
        return [i for i in picks[b, t].tolist() if i >= 0] if kind == "picks" else list(range(int(visible[0, t])))

    leaves = [x.requires_grad_() for x in (query, recent, sinks, *([] if entries is None else [entries]))]
    fast = sparse_attention(query, recent, entries, sinks, reach)
    slow = slow_attention(query, recent, entries, sinks, 4, past, sees)
    assert error(fast, slow) < 1e-12
    weight = inputs(*fast.shape)
    for got, expected in zip(
        torch.autograd.grad(fast, leaves, weight), torch.autograd.grad(slow, leaves, weight), strict=True
    ):
        assert error(got, expected) < 1e-12


def slow_index_loss(attention: Attention, frequencies: Tensor, h: Tensor, lengths: list[int], dense: bool) -> Tensor:
    """Query by query: shares of attention over the entries, summed over heads, against softmax of the index scores."""
    compressor = compressor_of(attention)
    indexer: Any = compressor.indexer
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        with torch.no_grad():
            entries = compressor.compress(h[b : b + 1], frequencies)[0]
            rotation = rope_rotation(torch.arange(h.shape[1]), frequencies)
            keys = rotate(attention.kv_norm(attention.kv_proj(h[b])), rotation)
            latent = attention.q_a_norm(attention.q_a_proj(h[b]))
            queries = attention.q_b_proj(latent).view(-1, attention.heads, attention.head_dim)
            queries = queries / (queries.pow(2).mean(-1, keepdim=True) + attention.eps).sqrt()
            queries = rotate(queries, rotation[:, None])
        index_keys = indexer.compress(h[b : b + 1], frequencies)[0]
        losses = []
        for t in range(length):
            visible = (t + 1) // compressor.ratio
            if visible <= indexer.topk:
                continue
            heads = rotate(indexer.q_b_proj(latent[t]).view(indexer.heads, -1), rotation[t])
            weights = indexer.scorer.weights_proj(h[b, t]) / math.sqrt(indexer.heads * indexer.width)
            scores = [
                torch.stack([w * (q @ index_keys[i]).clamp(min=0) for w, q in zip(weights, heads, strict=True)]).sum()
                for i in range(visible)
            ]
            order = sorted(range(visible), key=lambda i: (-float(scores[i]), i))
            compared = sorted(order[: visible if dense else indexer.topk])
            window = keys[max(0, t - attention.window + 1) : t + 1]
            share = torch.zeros(len(compared), dtype=torch.float64)
            with torch.no_grad():
                for head in range(attention.heads):
                    stacked = torch.cat((window, entries[compared]))
                    logits = stacked @ queries[t, head] / math.sqrt(attention.head_dim)
                    share += torch.softmax(torch.cat((logits, attention.sinks[head : head + 1])), 0)[len(window) : -1]
            share = share / share.sum()
            log_q = torch.log_softmax(torch.stack([scores[i] for i in compared]), 0)
            losses.append((share * (share.log() - log_q)).sum())
        if losses:
            total = total + torch.stack(losses).mean()
    return total


@pytest.mark.parametrize("indexing", ["dense", "sparse"])
@pytest.mark.parametrize("block", [128, 7])
def test_the_indexer_learns_from_attention_and_moves_nothing_else(
    indexing: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd.model.indexer, "QUERY_BLOCK", block)
    attention, frequencies = one_attention(CSA, index_topk=2)
    h = inputs(3, 26, 32).requires_grad_()
    lengths = [26, 17, 11]  # the last has no query that must choose
    rotation = rope_rotation(torch.arange(26), frequencies)[None]
    _, report = attention(h, rotation, frequencies, torch.tensor(lengths), indexing)
    assert report is not None
    slow = slow_index_loss(attention, frequencies, h.detach(), lengths, indexing == "dense")
    assert error(report.loss, slow) < 1e-12
    indexer: Any = compressor_of(attention).indexer
    parameters = list(indexer.parameters())
    assert torch.autograd.grad(report.loss, h, retain_graph=True, allow_unused=True) == (None,)
    others = [p for p in attention.parameters() if all(p is not q for q in parameters)]
    assert set(torch.autograd.grad(report.loss, others, retain_graph=True, allow_unused=True)) == {None}
    for got, expected in zip(
        torch.autograd.grad(report.loss, parameters), torch.autograd.grad(slow, parameters), strict=True
    ):
        assert error(got, expected) < 1e-12 and float(expected.abs().max()) > 0


def test_dense_indexing_attends_to_every_block_and_recall_is_one_when_nothing_is_missed() -> None:
    attention, frequencies = one_attention(CSA, index_topk=2)
    h = inputs(2, 26, 32)
    rotation, lengths = rope_rotation(torch.arange(26), frequencies)[None], torch.tensor([26, 26])
    dense, report = attention(h, rotation, frequencies, lengths, "dense")
    assert report is not None and 0 < float(report.recall[0]) < float(report.recall[1])
    sparse, _ = attention(h, rotation, frequencies, lengths, "sparse")
    assert error(sparse, run_attention(attention, frequencies, h)) < 1e-12
    indexer: Any = compressor_of(attention).indexer
    indexer.topk = 6
    assert error(dense, run_attention(attention, frequencies, h)) < 1e-12
    assert attention(h, rotation, frequencies, lengths, "dense")[1] is None  # six blocks, six picks
    indexer.topk = 2
    with pytest.MonkeyPatch().context() as patch:  # picks that rank as attention does miss nothing
        query = attention._queries(h, rotation)[1]
        recent = rotate(attention.kv_norm(attention.kv_proj(h)), rotation)
        entries = compressor_of(attention).compress(h, frequencies)
        visible = ((torch.arange(26) + 1) // 4)[None]
        reach = Reach(attention.window, visible=visible, ratio=4)
        shares = entry_shares(query, recent, entries, attention.sinks, reach, 0, 26)
        hidden = torch.arange(6) >= visible[..., None]
        patch.setattr(indexer, "pick", lambda *_: top_entries(shares.masked_fill(hidden, -torch.inf), 2))
        _, report = attention(h, rotation, frequencies, lengths, "sparse")
    assert report is not None and error(report.recall[0], report.recall[1]) < 1e-9


def test_index_scores_survive_the_hadamard_rotation_and_are_mxfp4_when_asked() -> None:
    matrix = hadamard(64)
    assert error(matrix @ matrix.T, torch.eye(64)) < 1e-6 and torch.equal(matrix, matrix.T)
    attention, frequencies = one_attention(CSA, index_topk=2, index_head_dim=32)
    indexer: Any = compressor_of(attention).indexer
    h, latent = inputs(2, 26, 32), inputs(2, 26, 24)
    rotation = rope_rotation(torch.arange(26), frequencies)[None]

    def scored() -> Tensor:
        query, weights = indexer.queries(h, latent, rotation)
        return index_scores(query, weights, indexer.compress(h, frequencies))

    plain = scored()
    with pytest.MonkeyPatch().context() as patch:
        indexer.quantized = True
        patch.setattr(opd.model.indexer, "fake_quantize", lambda x: x)
        assert error(scored(), plain) < 1e-5  # the matrix is float32
    rounded = scored()
    keys = indexer.compress(h, frequencies)
    assert torch.equal(fake_quantize(keys), keys)  # idempotent: MXFP4 values already
    assert 1e-3 < error(rounded, plain) / float(plain.abs().max()) < 0.3
    rounded.sum().backward()  # straight through
    assert all(float(p.grad.abs().sum()) > 0 for p in indexer.parameters())


@pytest.mark.parametrize("kind", [CSA, HCA])
@torch.no_grad()
def test_without_a_complete_block_only_the_window_is_left(kind: str) -> None:
    attention, frequencies = one_attention(kind, compress_rates={CSA: 8, HCA: 8})
    h = inputs(2, 15, 32)
    found = run_attention(attention, frequencies, h)
    attention.compressor = None
    window_only = run_attention(attention, frequencies, h)
    assert error(found[:, :7], window_only[:, :7]) < 1e-12
    assert float((found[:, 7:] - window_only[:, 7:]).abs().amax(-1).min()) > 1e-6


@torch.no_grad()
def test_grouped_linear_is_block_diagonal() -> None:
    layer = GroupedLinear(in_per_group=5, out_per_group=3, groups=4)
    x = torch.randn(2, 7, 4, 5)
    matrix = torch.block_diag(*layer.weight.view(4, 3, 5))
    assert error(layer(x), x.flatten(-2) @ matrix.T) < 1e-6


def test_norms_compute_in_float32_at_least() -> None:
    norm = RMSNorm(64, eps=1e-3)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 64)
    expected = torch.stack([oracles.rms(row.double(), 1e-3) for row in x])
    assert error(unit_rms(x, 1e-3), expected) < 1e-6
    assert error(norm(x), expected * norm.weight) < 1e-6
    assert error(norm.double()(x.double()), expected * norm.weight) < 1e-12
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(unit_rms(x.bfloat16(), 1e-3), unit_rms(x.bfloat16().float(), 1e-3).bfloat16())


# ---- hyper-connections -----------------------------------------------------------------------------------------------
#
# Streams are [n, N, D] and a token's matrix is [n, n, N]: the first index says from, the second to.


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_sinkhorn_and_its_gradient_are_the_plain_ones(n: int, iterations: int, eps: float) -> None:
    logits = (2 * inputs(n, n, 15)).requires_grad_()
    upstream = inputs(n, n, 15)
    found = sinkhorn(logits, iterations, eps)
    expected = torch.stack([oracles.sinkhorn(one, iterations, eps) for one in logits.unbind(-1)], dim=-1)
    assert error(found, expected) < 1e-12
    (found_grad,) = torch.autograd.grad(found, logits, upstream)
    (expected_grad,) = torch.autograd.grad(expected, logits, upstream)
    assert error(found_grad, expected_grad) < 1e-12


def test_sinkhorn_makes_matrices_doubly_stochastic() -> None:
    matrices = inputs(0)
    for deviation in (8.0, 1.0, 0.5):
        matrices = sinkhorn(deviation * inputs(4, 4, 2000), 20, 1e-6)
        assert float(matrices.min()) >= 0
        assert error(matrices.sum(0), torch.ones(4, 2000)) < 2e-6
        if deviation == 0.5:
            assert error(matrices.sum(1), torch.ones(4, 2000)) < 2e-6
            assert float(torch.linalg.matrix_norm(matrices.permute(2, 0, 1), 2).max()) <= 1 + 1e-5
    product = torch.eye(4, dtype=torch.float64)
    for depth in range(60):
        product = product @ matrices[..., depth]
    assert error(product.sum(0), torch.ones(4)) < 60 * 1.1e-6


def random_connection(n: int) -> HyperConnection:
    connection = HyperConnection(n, 12, 20, 1e-6, 1e-6).double()
    randomise(connection, n)
    return connection


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hyper_connection_token_by_token(n: int) -> None:
    config = tiny(hc_mult=n)
    connection = random_connection(n)
    streams, y, upstream = inputs(n, 10, 12).requires_grad_(), inputs(10, 12).requires_grad_(), inputs(n, 10, 12)
    site = connection.collapse(streams)
    expanded = connection.expand(site, y * site.hidden)
    weights: oracles.Weights = {**dict(connection.named_parameters())}
    wanted = []
    for t in range(10):
        expected = oracles.hyper_connection(config, streams[:, t], weights)
        for found, one in zip((site.hidden[t], site.post[..., t], site.residual[..., t]), expected, strict=True):
            assert error(found, one) < 1e-12
        wanted.append(oracles.hyper_expand(streams[:, t], y[t] * expected[0], expected[1], expected[2]))
    expected_streams = torch.stack(wanted, dim=1)
    assert error(expanded, expected_streams) < 1e-12
    parameters = [streams, y, *connection.parameters()]
    found_grads = torch.autograd.grad(expanded, parameters, upstream)
    for found_grad, expected_grad in zip(
        found_grads, torch.autograd.grad(expected_streams, parameters, upstream), strict=True
    ):
        assert error(found_grad, expected_grad) < 1e-10


@pytest.mark.parametrize("n", [1, 3])
def test_hyper_head_token_by_token(n: int) -> None:
    head = HyperHead(n, 12, 1e-6, 1e-6).double()
    randomise(head, n)
    streams = inputs(n, 10, 12).requires_grad_()
    collapsed = head(streams)
    weights: oracles.Weights = {"fn": head.hc_fn, "base": head.hc_base, "scale": head.hc_scale}
    expected = torch.stack([oracles.hyper_head(tiny(), streams[:, t], weights) for t in range(10)])
    assert error(collapsed, expected) < 1e-12
    parameters = [streams, *head.parameters()]
    for found_grad, expected_grad in zip(
        torch.autograd.grad(collapsed.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        assert error(found_grad, expected_grad) < 1e-10


@torch.no_grad()
def test_zero_mappings_average_the_streams() -> None:
    connection = random_connection(4)
    connection.fn.zero_()
    connection.base.zero_()
    streams, y = inputs(4, 10, 12), inputs(10, 12)
    site = connection.collapse(streams)
    assert error(site.hidden, (0.5 + 1e-6) * streams.sum(0)) < 1e-12
    assert error(site.post, torch.ones(4, 1)) < 1e-12
    assert error(site.residual, torch.full((4, 4, 1), 0.25)) < 1e-6
    after = connection.expand(site, y)
    assert error(after.mean(0), streams.mean(0) + y) < 1e-5


@torch.no_grad()
def test_streams_keep_their_sum() -> None:
    connection = random_connection(4)
    streams, y = inputs(4, 10, 12), inputs(10, 12)
    site = connection.collapse(streams)
    pre = torch.linalg.lstsq(streams.permute(1, 2, 0), site.hidden[..., None]).solution
    assert float(pre.min()) > 0 and float(pre.max()) < 1 + 1e-6
    assert float(site.post.min()) > 0 and float(site.post.max()) < 2
    after = connection.expand(site, y)
    kept = (site.residual.sum(1)[..., None] * streams).sum(0)
    assert error(after.sum(0), kept + site.post.sum(0)[:, None] * y) < 1e-12


@torch.no_grad()
def test_one_stream_is_a_plain_residual() -> None:
    connection = random_connection(1)
    streams, y = inputs(1, 10, 12), inputs(10, 12)
    site = connection.collapse(streams)
    after = connection.expand(site, y)
    assert error(after[0], streams[0] + site.post[0, :, None] * y) < 1e-4


@torch.no_grad()
def test_mappings_are_computed_in_float32_under_bfloat16_streams() -> None:
    connection = random_connection(4).float()
    streams = torch.randn(4, 10, 12).bfloat16()
    narrow, wide = connection.collapse(streams), connection.collapse(streams.float())
    assert {tensor.dtype for tensor in narrow} == {torch.bfloat16}
    for one, other in ((narrow.post, wide.post), (narrow.residual, wide.residual)):
        assert error(one, other) < 2**-8
    assert error(narrow.hidden, wide.hidden) < 0.05


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 0, 4, 1), (0, 0, 0, 5), (0, 0, 0, 0), (2, 2, 2, 2)])
def test_linear_by_segment_is_a_loop_over_experts(sizes: tuple[int, ...]) -> None:
    x, weight = inputs(sum(sizes), 6).requires_grad_(), inputs(4, 5, 6).requires_grad_()
    found = linear_by_segment(x, weight, sizes)
    expected = torch.cat([rows @ weight[e].T for e, rows in enumerate(x.split(list(sizes)))])
    assert found.shape == (sum(sizes), 5) and torch.allclose(found, expected, rtol=0, atol=1e-12)
    upstream = inputs(5, sum(sizes)).T  # not contiguous, as gradients may come
    for one, other in zip(
        torch.autograd.grad(found, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    for frozen, moving in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        (gradient,) = torch.autograd.grad(linear_by_segment(x, weight, sizes), moving, upstream)
        assert gradient.shape == moving.shape
        frozen.requires_grad_(True)


@pytest.mark.parametrize("mlp", ["hash_moe", "moe"])
@torch.no_grad()
def test_moe_token_by_token(mlp: str) -> None:
    for scoring in ("sqrtsoftplus", "sigmoid"):
        config = tiny(
            num_hidden_layers=1,
            layer_types=[WINDOW_ONLY],
            mlp_layer_types=[mlp],
            scoring_func=scoring,
            swiglu_limit=0.7,
        )
        moe = layers_of(random_model(config).double())[0].mlp
        u, ids = inputs(9, 32), torch.randint(40, (9,))
        out, scores, chosen = moe(u, ids)
        for t in range(9):
            expected = oracles.v4_moe(config, int(ids[t]), u[t], moe.state_dict())
            assert error(out[t], expected[0]) < 1e-12
            assert error(scores[t], expected[1]) < 1e-12
            assert sorted(chosen[t].tolist()) == sorted(expected[2])


def random_router(hash_vocab: int | None = None) -> Any:
    router = Router(6, 3, 12, "sqrtsoftplus", 2.5, hash_vocab)
    randomise(router, 0)
    return router


@torch.no_grad()
def test_the_bias_changes_the_choice_and_nothing_else() -> None:
    router = random_router()
    x, ids = torch.randn(200, 12), torch.zeros(200, dtype=torch.int64)
    scores, weights, chosen = router(x, ids)
    assert error(weights.sum(-1), torch.full((200,), 2.5)) < 1e-5
    assert error(weights / weights.sum(-1, keepdim=True), F.normalize(scores.gather(1, chosen), p=1, dim=1)) < 1e-6
    router.e_score_correction_bias += 0.7
    assert torch.equal(router(x, ids)[2].sort().values, chosen.sort().values)
    router.e_score_correction_bias[4] += 100
    other_scores, other_weights, other_chosen = router(x, ids)
    assert torch.equal(other_scores, scores)
    assert (other_chosen == 4).any(-1).all()
    same = (other_chosen.sort().values == chosen.sort().values).all(-1)
    assert 0 < same.sum() < 200
    assert error(other_weights[same].sort().values, weights[same].sort().values) < 1e-6


@torch.no_grad()
def test_hash_layers_route_by_token_id_alone() -> None:
    router = random_router(hash_vocab=9)
    ids = torch.arange(9).repeat(3)
    _, weights, chosen = router(torch.randn(27, 12), ids)
    assert torch.equal(chosen, router.tid2eid[ids])
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert error(weights.sum(-1), torch.full((27,), 2.5)) < 1e-5
    assert not torch.equal(weights[:9], weights[9:18])


def test_clamped_values_get_no_gradient() -> None:
    gate = torch.tensor([-30.0, 9.0, 10.5, 40.0, 2.0, 2.0, 2.0], requires_grad=True)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 11.0, -11.0, -9.0], requires_grad=True)
    out = swiglu(gate, up, 10.0)
    silu = [value * torch.sigmoid(torch.tensor(value)) for value in (-30.0, 9.0, 10.0, 10.0, 2.0, 2.0, 2.0)]
    assert torch.allclose(out, torch.tensor(silu) * torch.tensor([1.0, 1, 1, 1, 10, -10, -9]))
    gate_grad, up_grad = torch.autograd.grad(out.sum(), (gate, up))
    assert (gate_grad != 0).tolist() == [True, True, False, False, True, True, True]
    assert (up_grad != 0).tolist() == [True, True, True, True, False, False, True]
    affinity = affinities(torch.linspace(-20, 60, 500, dtype=torch.float64), "sqrtsoftplus")
    assert float(affinity.min()) > 0 and bool((affinity.diff() > 0).all())


def test_balance_statistics_by_counting() -> None:
    batch, length, experts, k = 3, 7, 5, 2
    real = torch.arange(length) < torch.tensor([7, 4, 1])[:, None]
    scores = torch.rand(batch * length, experts, dtype=torch.float64)
    chosen = torch.rand(batch * length, experts).argsort(-1)[:, :k]
    loss, load = 0.0, [0] * experts
    for b in range(batch):
        tokens = [b * length + t for t in range(length) if real[b, t]]
        for e in range(experts):
            sent = sum(e in chosen[i].tolist() for i in tokens)
            share = sum(float(scores[i, e] / scores[i].sum()) for i in tokens) / len(tokens)
            loss += experts * sent / (k * len(tokens)) * share
            load[e] += sent
    found_loss, found_load = balance_statistics(scores, chosen, real)
    assert math.isclose(float(found_loss), loss, rel_tol=1e-12)
    assert found_load.dtype == torch.int64 and found_load.tolist() == load


def test_the_balance_loss_is_one_when_balanced_and_pulls_towards_it() -> None:
    chosen = torch.stack((torch.arange(12) % 6, (torch.arange(12) + 1) % 6), 1)
    real = torch.ones(2, 6, dtype=torch.bool)
    loss, load = balance_statistics(torch.rand(12, 6), chosen, real)
    assert math.isclose(float(loss), 2.0, rel_tol=1e-5)  # f_e = 1 and the shares sum to 1, for each of two sequences
    assert load.tolist() == [4] * 6
    scores = torch.rand(12, 6, requires_grad=True)
    loss, _ = balance_statistics(scores, torch.zeros(12, 1, dtype=torch.int64), real)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert bool((gradient[:, 0] > 0).all()) and bool((gradient[:, 1:] < 0).all())


@torch.no_grad()
def test_overloaded_experts_become_less_likely() -> None:
    model = random_model(tiny())
    routers = [block.mlp.gate for block in layers_of(model)][1:]  # layer 0 routes by hash
    before = [router.e_score_correction_bias.clone() for router in routers]
    load = torch.tensor([[5, 1, 3, 3, 3, 3], [0, 0, 0, 0, 0, 6], [2, 2, 2, 2, 2, 2]])
    model.update_selection_bias(load, 0.5)
    signs = [[-1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, -1], [0] * 6]
    for router, old, sign in zip(routers, before, signs, strict=True):
        assert error(router.e_score_correction_bias, old + 0.5 * torch.tensor(sign)) < 1e-6
    with pytest.raises(ValueError, match="shorter|longer"):
        model.update_selection_bias(load[:2], 0.5)
    tokens, lengths = random_rows(model.config, [40, 40])
    for _ in range(40):
        model.update_selection_bias(model(tokens, lengths).expert_load, 0.05)
    final = model(tokens, lengths).expert_load
    assert int(final.max()) < 2 * 80 * 2 / 6


def test_nothing_to_balance_in_a_model_of_hash_layers() -> None:
    model = random_model(tiny(mlp_layer_types=["hash_moe"] * 4))
    output = model(*random_rows(model.config, [5]))
    assert output.expert_load.shape == (0, 0) and float(output.balance_loss) == 0.0
    model.update_selection_bias(output.expert_load, 0.5)


def test_the_balance_loss_trains_the_router() -> None:
    model = random_model(tiny())
    model(*random_rows(model.config, [9, 5])).balance_loss.backward()
    for block in layers_of(model)[1:]:
        assert bool(block.mlp.gate.weight.grad.any())


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_tiny() -> DeepseekV4:
    return random_model(tiny())


@pytest.fixture(scope="module")
def saved(random_tiny: DeepseekV4, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "ours"
    save_checkpoint(folder, random_tiny, None)
    return folder


@torch.no_grad()
def test_transformers_opens_what_we_save(random_tiny: DeepseekV4, saved: Path) -> None:
    opened: Any = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    theirs, loading = opened
    assert isinstance(theirs, DeepseekV4ForCausalLM)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tokens, _ = random_rows(random_tiny.config, [33, 33])
    assert error(theirs(input_ids=tokens, use_cache=False).logits, logits_of(random_tiny, tokens)) < TOLERANCE


@torch.no_grad()
def test_we_open_what_transformers_saves(random_tiny: DeepseekV4, tmp_path: Path) -> None:
    theirs = DeepseekV4ForCausalLM(random_tiny.config)
    theirs.load_state_dict(random_tiny.state_dict())
    tokens, _ = random_rows(random_tiny.config, [33, 33])
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("whole", "sharded"):
        loaded = load_model(ModelConfig(fp4="none"), str(tmp_path / folder))
        assert isinstance(loaded, DeepseekV4)
        assert torch.equal(logits_of(loaded, tokens), logits_of(random_tiny, tokens))
    theirs.bfloat16().save_pretrained(tmp_path / "bfloat16")
    narrow = load_model(ModelConfig(path=str(tmp_path / "bfloat16"), fp4="none"))
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}
    assert error(narrow.head, random_tiny.head) < 1e-2


@torch.no_grad()
def test_yarn_survives_a_checkpoint(tmp_path: Path) -> None:
    model = random_model(tiny(rope_parameters=dict(YARN)))
    save_checkpoint(tmp_path / "yarn", model, None)
    tokens, _ = random_rows(model.config, [33])
    loaded = load_model(ModelConfig(fp4="none"), str(tmp_path / "yarn"))
    assert isinstance(loaded, DeepseekV4)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "yarn")
    assert error(theirs(input_ids=tokens, use_cache=False).logits, logits_of(model, tokens)) < TOLERANCE


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit_tensors(lambda t: t.pop("model.layers.2.self_attn.sinks")),
            r"lacks the tensor model.layers.2.self_attn.sinks",
        ),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
            r"model.norm.weight as \[31\]; .*asks for \[32\]",
        ),
        (
            edit_tensors(lambda t: t.update({"model.layers.9.self_attn.sinks": torch.ones(4)})),
            r"model.layers.9.self_attn.sinks that its config.json has no place for",
        ),
        (edit_config(hidden_size=64), r"model.embed_tokens.weight as \[40, 32\]; .*asks for \[40, 64\]"),
        (edit_config(o_groups=3), r"o_groups=3.*num_attention_heads=4"),
        (cut, r"model.safetensors is not a complete safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_wrong(
    damage: Callable[[Path], None], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_model(ModelConfig(fp4="none"), str(folder))
    assert "damaged" in str(refusal.value) or "model.config" in str(refusal.value)


def test_another_family_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="llama holds a llama model.*family=hf"):
        load_model(ModelConfig(), str(tmp_path / "llama"))
    with pytest.raises(ConfigError, match="model.path is null"):
        load_model(ModelConfig())
    with pytest.raises(ConfigError, match="absent.*does not exist"):
        load_model(ModelConfig(path=str(tmp_path / "absent")))


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "hiden_size.*hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size.*'wide'"),
        ({"layer_types": [CSA]}, r"num_hidden_layers.*4.*layer_types.*1"),
        ({"layer_types": ["dense"] * 4}, "layer_types.*dense"),
        ({"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types.*dense"),
        ({"o_groups": 3}, "o_groups=3.*num_attention_heads=4"),
        ({"o_groups": 0}, "o_groups=0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor=0.2.*3 RoPE channels"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
        ({"index_head_dim": 2}, "index_head_dim=2"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7.*6 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
        ({"scoring_func": "relu"}, "scoring_func='relu'.*sqrtsoftplus"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"compress_rates": {CSA: 9, HCA: 8}}, f"compress_rates.{CSA}=9.*sliding_window=8"),
        ({"compress_rates": {CSA: 0, HCA: 8}}, f"compress_rates.{CSA}=0"),
        ({"compress_rates": {CSA: 2.5, HCA: 8}}, f"compress_rates.{CSA}=2.5"),
        ({"compress_rates": {CSA: 4}}, f"compress_rates.*{HCA}"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.*linear.*yarn"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.5}}, "rope_parameters.*attention_factor.*1.5"),
        ({"rope_theta": -1.0}, "rope_theta.*-1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1"),
        ({"swiglu_limit": 0.0}, "swiglu_limit=0"),
        *(({key: 0}, f"{key}=0") for key in (
            "vocab_size", "hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim", "q_lora_rank",
            "o_lora_rank", "sliding_window", "n_routed_experts", "index_n_heads", "index_topk", "hc_mult",
            "hc_sinkhorn_iters", "max_position_embeddings",
        )),
        ({"num_hidden_layers": 0, "layer_types": [], "mlp_layer_types": []}, "num_hidden_layers=0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)model.config.*{message}"):
        tiny(**changes)


def test_rope_that_transformers_would_read_differently_is_refused() -> None:
    nested = {
        "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        "compress": {**YARN, "rope_theta": 1e4, "partial_rotary_factor": 0.25, "attention_factor": 1.0},
    }
    tiny(rope_parameters=nested)
    compress = {key: value for key, value in nested["compress"].items() if key != "attention_factor"}
    with pytest.raises(ConfigError, match="attention_factor"):
        tiny(rope_parameters={**nested, "compress": compress})
    with pytest.raises(ConfigError, match="partial_rotary_factor.*0.5"):
        tiny(rope_parameters={**nested, "main": {**nested["main"], "partial_rotary_factor": 0.5}})


def test_published_and_legacy_field_names() -> None:
    fields = {
        key: value for key, value in TINY.items() if key not in ("layer_types", "compress_rates", "mlp_layer_types")
    }
    del fields["partial_rotary_factor"]
    config = v4_config(
        {**fields, "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "qk_rope_head_dim": 4,
         "sliding_window": 128}
    )  # fmt: skip
    assert config.layer_types == TINY["layer_types"] and config.mlp_layer_types == TINY["mlp_layer_types"]
    assert config.compress_rates == {CSA: 4, HCA: 128} and config.qk_rope_head_dim == 4
    check_v4_config(DeepseekV4Config())  # what is published for Flash and Pro is allowed


def test_a_new_model_has_room_for_the_tokenizer() -> None:
    fields = {key: value for key, value in TINY.items() if key != "vocab_size"}
    assert new_v4(ModelConfig(config=fields, fp4="none"), 33, seed=0).head.shape == (33, 32)
    with pytest.raises(ConfigError, match="vocab_size=40 is smaller than the tokenizer's 41"):
        new_v4(ModelConfig(config=TINY, fp4="none"), 41, seed=0)
    with pytest.raises(ConfigError, match="moe_intermediate_size=16.*multiple of 32"):
        new_v4(ModelConfig(config=TINY, fp4="experts"), 40, seed=0)


# ---- FP4 -------------------------------------------------------------------------------------------------------------


def test_a_quantised_forward_is_the_forward_of_the_published_weights() -> None:
    config = tiny(moe_intermediate_size=32)
    learner = DeepseekV4(config, fp4="experts")
    randomise(learner, 0)
    worker, unpacked = DeepseekV4(config, fp4="experts"), DeepseekV4(config, fp4="none")
    snapshot = snapshot_of(learner, 0, "experts")
    apply_snapshot(worker, snapshot)
    apply_snapshot(unpacked, snapshot)
    rows = random_rows(config, [20, 13])
    hidden = [model(*rows).hidden for model in (learner, worker, unpacked)]
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    unrounded = DeepseekV4(config, fp4="none")
    unrounded.load_state_dict(learner.state_dict())
    assert error(unrounded(*rows).hidden, hidden[0]) > 1e-3

    projection = torch.randn_like(hidden[0])
    for out in hidden:
        (out * projection).sum().backward()
    for (name, master), published, same in zip(
        learner.named_parameters(), unpacked.parameters(), worker.parameters(), strict=True
    ):
        if published.grad is None:
            assert master.grad is None, name
            continue
        assert master.grad is not None and same.grad is not None
        assert torch.equal(master.grad, published.grad) and torch.equal(master.grad, same.grad), name
        assert torch.equal(master, published) == (not name.endswith(("gate_up_proj", "mlp.experts.down_proj"))), name


# ---- fresh weights ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_model_is_nearly_uniform_and_a_function_of_the_seed() -> None:
    config = tiny(vocab_size=500)
    model, again, other = (DeepseekV4(config) for _ in range(3))
    for tensor in [*model.state_dict().values(), *again.state_dict().values()]:
        tensor.fill_(3)  # what initialisation leaves untouched shows
    initialize(model, 7)
    initialize(again, 7)
    initialize(other, 8)
    states = [one.state_dict() for one in (model, again, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if "bias" not in name)
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    for name, tensor in states[0].items():
        if name.endswith("tid2eid"):
            assert all(len(set(row)) == 2 for row in tensor.tolist())
            assert tensor.unique().tolist() == list(range(6))
    tokens, lengths = random_rows(config, [60, 60])
    hidden = model(tokens, lengths).hidden
    assert 0.5 < float(hidden.square().mean().sqrt()) < 2
    loss = F.cross_entropy((hidden @ model.head.T)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - math.log(500)) < 1.0


def test_names_and_shapes_are_the_published_ones() -> None:
    config = tiny()
    ours, theirs = DeepseekV4(config), DeepseekV4ForCausalLM(config)
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert num_parameters(ours) == theirs.num_parameters()
