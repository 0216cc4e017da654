"""Rollouts: whatever the batching, the tokens are those of one slow request at a time, and so are the log-probs."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rollout.engine
from opd.actors import ActorDied, LocalStore, Runtime, open_runtime
from opd.batching import collate
from opd.config import (
    Config,
    ConfigError,
    DataConfig,
    DomainConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
    SamplingConfig,
    check_config,
)
from opd.fp4 import Fp4Linear, dequantize, is_fp4_name, packed_weights
from opd.losses import sampler_gap, token_logprobs
from opd.model import HubModel
from opd.model.cache import Cache
from opd.model.hub import load_hub_model
from opd.model.step import Extend, Part, stepper
from opd.model.transformer import DeepseekV4, initialize, v4_config
from opd.types import Actor, Fp4Tensor, Future, Group, Prompt, Trajectory, VersionSpan, WeightSnapshot
from opd.weights import named_weights, save_checkpoint, snapshot_of
from rollout.engine import V4Engine, pages_of
from rollout.fleet import PROBES, Fleet
from rollout.hub_engine import HubEngine
from rollout.request import NO_SAMPLES, Request, Samples, TruncatedTrajectory
from rollout.sampling import sample, trajectory_key, truncates, uniform
from rollout.wal import Log, LogDamaged, LogKey, read_batch, read_log
from rollout.worker import RolloutWorker

VOCAB, STOP, MAX_TOKENS, SEED = 40, 1, 32, 11
GOLDEN_KEY, GOLDEN_NOISE = -4530709671718645755, 0.7126465414299984
PROMPT_LENGTHS = (1, 4, 7, 13, 3, 20, 8, 30)  # on both sides of block and window borders; the last leaves room for 2
SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=8)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)
TRUNCATED = SamplingConfig(temperature=0.7, top_k=12, top_p=0.8, max_new_tokens=8)
ALL_CUTS = SamplingConfig(temperature=1.1, top_k=20, top_p=0.9, min_p=0.05, max_new_tokens=8)


def v4(seed: int, fp4: str = "none") -> DeepseekV4:
    fields = {
        "vocab_size": VOCAB, "hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25,
        "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "max_position_embeddings": 64, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    model = DeepseekV4(v4_config(fields), fp4)
    initialize(model, seed)
    return model


@pytest.fixture(scope="module")
def policy() -> DeepseekV4:
    return v4(seed=0)


def engine_of(model: DeepseekV4, num_slots: int, stop_ids: Sequence[int] = (STOP,)) -> V4Engine:
    return V4Engine(model, num_slots=num_slots, max_tokens=MAX_TOKENS, stop_ids=stop_ids, seed=SEED)


def prompt_of(index: int) -> tuple[int, ...]:
    return tuple(random.Random(index).choices(range(2, VOCAB), k=PROMPT_LENGTHS[index]))


def requests_of(group_size: int, prompts: Sequence[int] = tuple(range(len(PROMPT_LENGTHS)))) -> list[Request]:
    return [
        Request(trajectory_id=f"{i}#{k}@test", prompt_id=str(i), domain="d", token_ids=prompt_of(i))
        for i in prompts
        for k in range(group_size)
    ]


def assert_same(left: Sequence[Trajectory], right: Sequence[Trajectory]) -> None:
    """The same trajectories in any order; log-probs to rounding."""
    others = {trajectory.id: trajectory for trajectory in right}
    assert sorted(others) == sorted(trajectory.id for trajectory in left)
    for a in left:
        b = others[a.id]
        assert a.token_ids.tolist() == b.token_ids.tolist(), a.id
        assert a.finish_reason == b.finish_reason and a.version_spans == b.version_spans
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=1e-4)
        assert type(a) is type(b)
        if isinstance(a, TruncatedTrajectory) and isinstance(b, TruncatedTrajectory):
            np.testing.assert_array_equal(a.kept_counts, b.kept_counts)
            np.testing.assert_array_equal(a.kept_ids, b.kept_ids)
            np.testing.assert_allclose(a.untruncated_logprobs, b.untruncated_logprobs, rtol=0, atol=1e-4)


def assert_is_oracles(
    trajectories: Sequence[Trajectory],
    requests: Sequence[Request],
    sampling: SamplingConfig,
    logits_after: Callable[[list[int]], list[float]],
    stop_ids: list[int],
) -> None:
    for request, trajectory in zip(requests, trajectories, strict=True):
        prompt = list(request.token_ids)
        tokens, logprobs, reason = oracles.complete(
            logits_after,
            prompt,
            trajectory_key(request.trajectory_id, SEED),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            most_tokens=min(sampling.max_new_tokens, MAX_TOKENS - len(prompt)),
            stop_ids=stop_ids,
        )
        assert trajectory.id == request.trajectory_id and trajectory.prompt_id == request.prompt_id
        assert trajectory.token_ids.tolist() == prompt + tokens, request.trajectory_id
        np.testing.assert_allclose(trajectory.sampler_logprobs, [0.0] * len(prompt) + logprobs, rtol=0, atol=1e-4)
        assert trajectory.finish_reason == reason
        assert trajectory.loss_mask.tolist() == [False] * len(prompt) + [True] * len(tokens)
        assert (trajectory.token_ids.dtype, trajectory.sampler_logprobs.dtype) == (np.int32, np.float32)


def assert_kept_is_oracles(
    trajectory: Trajectory, sampling: SamplingConfig, logits_after: Callable[[list[int]], list[float]]
) -> None:
    """Which ids truncation kept at each token, and what the token's log-prob was before: enough to replay it."""
    if not truncates(sampling):  # there is nothing to replay
        assert type(trajectory) is Trajectory
        return
    t = trajectory
    assert isinstance(t, TruncatedTrajectory)
    assert (t.kept_counts.dtype, t.kept_ids.dtype, t.untruncated_logprobs.dtype) == (np.int32, np.int32, np.float32)
    start = len(t.token_ids) - t.num_loss_tokens
    assert not t.kept_counts[:start].any() and not t.untruncated_logprobs[:start].any()
    kept_ids = np.split(t.kept_ids, t.kept_counts.cumsum())
    assert len(kept_ids[-1]) == 0
    for position in range(start, len(t.token_ids)):
        logits, token = logits_after(t.token_ids[:position].tolist()), int(t.token_ids[position])
        plain = oracles.drawn_from(logits, sampling.temperature, 0, 1.0)
        kept = [token for token, p in enumerate(truncated(logits, sampling)) if p > 0]
        assert kept_ids[position].tolist() == kept
        assert t.untruncated_logprobs[position] == pytest.approx(math.log(plain[token]), abs=1e-4)
        replayed = plain[token] / sum(plain[i] for i in kept)
        assert t.sampler_logprobs[position] == pytest.approx(math.log(replayed), abs=1e-4)


@torch.inference_mode()
def v4_logits(model: DeepseekV4, token_ids: list[int]) -> list[float]:
    hidden = model(torch.tensor([token_ids]), torch.tensor([len(token_ids)])).hidden[0, -1]
    return (model.head.double() @ hidden.double()).tolist()


# ---- noise and draw --------------------------------------------------------------------------------------------------


def test_noise_is_splitmix64_for_ever() -> None:
    # The first outputs of the published generator from state 0, and one stream of ours.
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    found = uniform(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert found.tolist() == [((z >> 12) + 0.5) / 2**52 for z in known]
    key = trajectory_key("chain_sum/train/17#0@distill/3", 0)
    assert key == GOLDEN_KEY
    assert uniform(torch.tensor([key]), torch.tensor([9])).item() == GOLDEN_NOISE
    keys = [trajectory_key(f"{i}", 5) for i in range(50)]
    assert any(key < 0 for key in keys) and any(key > 0 for key in keys)
    for position in (0, 7, 2**20):
        found = uniform(torch.tensor(keys), torch.full((50,), position))
        assert found.tolist() == [oracles.noise(key, position) for key in keys]
    assert trajectory_key("a", 1) != trajectory_key("a", 2) != trajectory_key("b", 2)


def test_noise_is_uniform_and_independent_over_trajectories_and_positions() -> None:
    count = 20_000
    keys = torch.tensor([trajectory_key(f"prompt#{i}@0", SEED) for i in range(count)])
    over_keys = uniform(keys, torch.full((count,), 3)).numpy()
    next_token = uniform(keys, torch.full((count,), 4)).numpy()
    over_positions = uniform(keys[:1].expand(count), torch.arange(count)).numpy()
    neighbours = uniform(torch.arange(count), torch.zeros(count, dtype=torch.int64)).numpy()  # keys one apart
    for values in (over_keys, over_positions, neighbours):  # Kolmogorov-Smirnov, at one in a thousand
        ranks = np.arange(count) / count
        ordered = np.sort(values)
        distance = max(np.max(ordered - ranks), np.max(ranks + 1 / count - ordered))
        assert distance < 1.95 / math.sqrt(count)
    pairs = ((over_keys, next_token), (over_keys[:-1], over_keys[1:]), (over_positions[:-1], over_positions[1:]))
    for first, second in (*pairs, (neighbours[:-1], neighbours[1:])):  # chi squared on a 16 by 16 grid, four sigma
        counts, _, _ = np.histogram2d(first, second, bins=16, range=[[0, 1], [0, 1]])
        expected = len(first) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 4 * math.sqrt(2 * 255)


def key_for(output: int, position: int) -> int:
    """The signed key whose generator gives the 64-bit `output` at `position`: SplitMix64 backwards."""
    word, z = 2**64, output
    z = z ^ (z >> 31) ^ (z >> 62)
    z = z * pow(0x94D049BB133111EB, -1, word) % word
    z = z ^ (z >> 27) ^ (z >> 54)
    z = z * pow(0xBF58476D1CE4E5B9, -1, word) % word
    z = z ^ (z >> 30) ^ (z >> 60)
    key = (z - (position + 1) * 0x9E3779B97F4A7C15) % word
    return key - word if key >= word // 2 else key


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Draws in one compiled pass, and in tensor operations."""
    if request.param == "plain":
        monkeypatch.setattr("opd.kernels.draw.usable", lambda logits: False)
    return request.param


@pytest.mark.usefixtures("way")
def test_the_ends_of_the_interval_are_never_reached_and_never_leave_the_support() -> None:
    keys = torch.tensor([key_for(output, 6) for output in (0, 2**64 - 1)])
    lowest, highest = uniform(keys, torch.full((2,), 6)).tolist()
    assert 0.0 < lowest < 1e-15 and highest == 1.0 - 2**-53
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1, 301, generator=generator) * 3
        logits[:, [0, 300]] = -200.0  # no mass at either end, in float32
        for sampling in (SAMPLED, TRUNCATED):
            tokens, logprobs = sample(logits.expand(2, -1), keys, torch.full((2,), 6), sampling)[:2]
            probabilities = oracles.drawn_from(logits[0].tolist(), sampling.temperature, sampling.top_k, sampling.top_p)
            support = [token for token, p in enumerate(probabilities) if p > 1e-9]
            assert tokens.tolist()[0] == support[0] and tokens.tolist()[1] in support[-3:]
            assert torch.isfinite(logprobs).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 9, 0.75), (1.0, 1, 1.0), (1.0, 0, 1e-6)],
)
def test_draw_is_the_oracles(temperature: float, top_k: int, top_p: float) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(60, 25, generator=torch.Generator().manual_seed(1)) * 2
    logits[30:] = (logits[30:] * 2).round() / 2  # many ties
    keys, positions = torch.arange(60) * 7919 - 30, torch.arange(60) % 5
    tokens, logprobs = sample(logits, keys, positions, sampling)[:2]
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        probabilities = oracles.drawn_from(logits[row].tolist(), temperature, top_k, top_p)
        assert token == oracles.draw(probabilities, oracles.noise(int(keys[row]), int(positions[row]))), row
        assert logprob == pytest.approx(math.log(probabilities[token]), abs=1e-5)


def truncated(logits: list[float], sampling: SamplingConfig) -> list[float]:
    return oracles.drawn_from(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.3), (4, 1.0, 0.05), (0, 0.7, 0.6), (3, 0.9, 0.2)])
def test_min_p_cuts_off_after_the_rest(top_k: int, top_p: float, min_p: float) -> None:
    sampling = SamplingConfig(temperature=1.2, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.randn(60, 25, generator=torch.Generator().manual_seed(2)) * 2
    keys, positions = torch.arange(60) * 104729, torch.arange(60) % 5
    draws = sample(logits, keys, positions, sampling)
    assert draws.kept is not None
    for row in range(60):
        p = truncated(logits[row].tolist(), sampling)
        token = oracles.draw(p, oracles.noise(int(keys[row]), int(positions[row])))
        assert draws.tokens[row] == token
        assert draws.logprobs[row].item() == pytest.approx(math.log(p[token]), abs=1e-5)
        assert draws.kept[row].tolist() == [value > 0 for value in p]


def test_draws_have_the_frequencies_of_the_truncated_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 2.0, -3.0, 0.2]])
    count = 20_000
    keys = torch.tensor([trajectory_key(str(i), 0) for i in range(count)])
    tokens = sample(logits.expand(count, -1), keys, torch.zeros_like(keys), SamplingConfig(top_p=0.9, top_k=6)).tokens
    expected = np.array(oracles.drawn_from(logits[0].tolist(), 1.0, 6, 0.9)) * count
    found = np.bincount(tokens.numpy(), minlength=8)
    kept = expected > 0
    assert 3 < kept.sum() < 8 and not found[~kept].any()
    assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 22  # five degrees of freedom, below one in 1000


def test_greedy_takes_the_lowest_id_among_equals_and_tells_the_plain_log_prob() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, -1.0, 0.0, 2.0]])
    tokens, logprobs = sample(logits, torch.tensor([0, 0]), torch.tensor([0, 0]), GREEDY)[:2]
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise(value: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    none = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits are not finite \(row 1\)"):
        sample(logits, none, none, SamplingConfig(temperature=temperature))


def test_both_ways_draw_the_same_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of a block's border and of a vector's; rows do not depend on each other."""
    generator, sampling = torch.Generator().manual_seed(3), SamplingConfig(temperature=0.8)
    for width in (1, 2, 7, 16, 17, 63, 64, 65, 128, 1000, 40_000):
        logits = torch.randn(50, width, generator=generator) * 4
        keys = torch.randint(-(2**62), 2**62, (50,), generator=generator)
        positions = torch.arange(50) % 9
        found = sample(logits, keys, positions, sampling)
        alone = sample(logits[7:8], keys[7:8], positions[7:8], sampling)
        assert found.tokens[7] == alone.tokens[0] and found.logprobs[7] == alone.logprobs[0]
        with monkeypatch.context() as patch:
            patch.setattr("opd.kernels.draw.usable", lambda logits: False)
            expected = sample(logits, keys, positions, sampling)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert torch.allclose(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)


# ---- the V4 engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "group_size", "stop_ids"),
    [(SAMPLED, 2, (STOP, 9, 17)), (TRUNCATED, 1, (STOP,)), (GREEDY, 1, (STOP,))],
    ids=["sampled", "truncated", "greedy"],
)
def test_engine_is_the_slow_oracle(
    policy: DeepseekV4, sampling: SamplingConfig, group_size: int, stop_ids: tuple[int, ...]
) -> None:
    requests = requests_of(group_size)
    produced = engine_of(policy, 5, stop_ids).generate(requests, sampling, 4)
    assert_is_oracles(produced, requests, sampling, lambda ids: v4_logits(policy, ids), list(stop_ids))
    for request, trajectory in zip(requests, produced, strict=True):
        assert trajectory.version_spans == (VersionSpan(start=len(request.token_ids), policy_version=4),)
    if sampling is SAMPLED:  # the case is worth something only if both ends happen, and not at the same length
        assert {t.finish_reason for t in produced} == {"stop", "length"}
        assert len({t.num_loss_tokens for t in produced}) > 3


@pytest.mark.parametrize(
    "sampling", [SAMPLED, GREEDY, TRUNCATED, ALL_CUTS], ids=["sampled", "greedy", "truncated", "all_cuts"]
)
def test_whoever_samples_in_whatever_order_it_is_the_slow_oracle(policy: DeepseekV4, sampling: SamplingConfig) -> None:
    """Requests are dealt to several engines at random; each has slots, pages and chunks of its own."""
    requests, stop_ids = requests_of(2), (STOP, 9)
    logits: dict[tuple[int, ...], list[float]] = {}

    def logits_after(token_ids: list[int]) -> list[float]:
        key = tuple(token_ids)
        if key not in logits:
            logits[key] = v4_logits(policy, token_ids)
        return logits[key]

    for trial in range(3):
        rng = random.Random(trial)
        num_engines = rng.randint(1, 3)
        hands: list[list[Request]] = [[] for _ in range(num_engines)]
        for request in rng.sample(requests, len(requests)):
            rng.choice(hands).append(request)
        for hand in hands:
            engine = V4Engine(
                policy,
                num_slots=rng.choice((1, 2, 5, 20)),
                max_tokens=MAX_TOKENS,
                stop_ids=stop_ids,
                seed=SEED,
                prefill_tokens=rng.choice((2, 8, 29, 200)),
                num_pages=rng.choice((4, 5, 9, None)),
            )
            produced = engine.generate(hand, sampling, 0)
            assert_is_oracles(produced, hand, sampling, logits_after, list(stop_ids))
            for trajectory in produced:
                assert_kept_is_oracles(trajectory, sampling, logits_after)


@pytest.mark.parametrize("sampling", [SAMPLED, TRUNCATED, ALL_CUTS], ids=["sampled", "truncated", "all_cuts"])
def test_the_learners_gap_is_rounding_whatever_is_cut_off(policy: DeepseekV4, sampling: SamplingConfig) -> None:
    batch = collate(engine_of(policy, 5).generate(requests_of(2), sampling, 0), 0)
    with torch.inference_mode():
        hidden = policy(batch.token_ids, batch.lengths).hidden[batch.rows, batch.positions]
        policy_logprobs = token_logprobs(hidden, policy.head, batch.targets, temperature=sampling.temperature)[0]
    gap = sampler_gap(policy_logprobs, batch.sampler_logprobs)
    assert gap["num_tokens"] > 20 and gap["max_gap"] < 1e-4


@pytest.mark.parametrize("num_slots", [1, 2, 5, 30])
def test_slots_and_order_change_nothing(policy: DeepseekV4, num_slots: int) -> None:
    prompts, few = (0, 3, 5, 2, 7), dataclasses.replace(SAMPLED, max_new_tokens=5)
    requests = requests_of(3, prompts)
    expected = engine_of(policy, 7).generate(requests, few, 0)
    engine = engine_of(policy, num_slots)
    assert_same(engine.generate(requests, few, 0), expected)
    # Groups that do not fit the free slots are read once all the same.
    assert engine.prefilled_tokens == sum(PROMPT_LENGTHS[index] for index in prompts)
    shuffled = random.Random(num_slots).sample(requests, len(requests))
    produced = engine.generate(shuffled, few, 0)
    assert [trajectory.id for trajectory in produced] == [request.trajectory_id for request in shuffled]
    assert_same(produced, expected)


def test_a_trajectory_does_not_depend_on_its_company(policy: DeepseekV4, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(4)
    expected = {t.id: t for t in engine_of(policy, 6).generate(requests, SAMPLED, 0)}
    engine = engine_of(policy, 6)
    some = requests[2:3] + requests[9:17] + requests[30:]
    assert_same(engine.generate(some, SAMPLED, 0), [expected[request.trajectory_id] for request in some])
    engine.prefill_tokens = 24  # prompts are read in several calls
    monkeypatch.setattr(rollout.engine, "REFILL_SHARE", 6)
    assert_same(engine.generate(requests, SAMPLED, 0), list(expected.values()))
    tokens = {tuple(t.token_ids[13:].tolist()) for t in expected.values() if t.prompt_id == "3"}
    assert len(tokens) == 4  # samples of a group differ
    other_seed = V4Engine(policy, num_slots=6, max_tokens=MAX_TOKENS, stop_ids=[STOP], seed=SEED + 1)
    others = other_seed.generate(requests, SAMPLED, 0)
    assert sum(t.token_ids.tolist() == expected[t.id].token_ids.tolist() for t in others) < 4


def test_slots_carry_nothing_over_to_other_weights() -> None:
    model = v4(seed=1)
    requests = requests_of(2)
    engine = engine_of(model, 5)
    engine.generate(requests, SAMPLED, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.nan)  # fills cache and shelf with NaN, and fails
    with pytest.raises(ValueError, match="not finite"):
        engine.generate(requests, SAMPLED, 1)
    initialize(model, 2)
    assert_same(engine.generate(requests, SAMPLED, 2), engine_of(v4(seed=2), 5).generate(requests, SAMPLED, 2))


def test_ends(policy: DeepseekV4) -> None:
    requests = requests_of(2)
    for trajectory in engine_of(policy, 3, range(VOCAB)).generate(requests, SAMPLED, 0):  # every token stops
        assert trajectory.num_loss_tokens == 1 and trajectory.finish_reason == "stop"
    endless = dataclasses.replace(SAMPLED, max_new_tokens=1000)
    produced = engine_of(policy, 3, ()).generate(requests, endless, 0)  # none does
    assert {len(trajectory.token_ids) for trajectory in produced} == {MAX_TOKENS}
    assert {trajectory.finish_reason for trajectory in produced} == {"length"}
    # A stop token at the last place allowed is a stop, and one in the prompt is none.
    last = int(produced[0].token_ids[-1])
    for trajectory in engine_of(policy, 3, (last,)).generate(requests[:1], endless, 0):
        assert trajectory.finish_reason == "stop"
    stop_in_prompt = int(requests[4].token_ids[2])
    (trajectory,) = engine_of(policy, 3, (stop_in_prompt,)).generate(
        requests[4:5], dataclasses.replace(SAMPLED, max_new_tokens=1), 0
    )
    assert trajectory.num_loss_tokens == 1
    assert engine_of(policy, 3).generate([], SAMPLED, 0) == []


def test_prompts_without_room_are_refused(policy: DeepseekV4) -> None:
    for length in (0, MAX_TOKENS, MAX_TOKENS + 5):
        request = Request(trajectory_id="x", prompt_id="domain/train/3", domain="d", token_ids=(3,) * length)
        with pytest.raises(ValueError, match=rf"prompt domain/train/3 has {length} tokens; the engine takes 1 to 31"):
            engine_of(policy, 2).generate([*requests_of(1), request], SAMPLED, 0)
    longest = Request(trajectory_id="x", prompt_id="p", domain="d", token_ids=(3,) * (MAX_TOKENS - 1))
    assert engine_of(policy, 2).generate([longest], SAMPLED, 0)[0].num_loss_tokens == 1


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_work_per_token_is_tensors_over_slots(policy: DeepseekV4) -> None:
    """Eight times the requests in eight times the slots are hardly more operations."""
    counts = []
    for size in (1, 8):
        engine = engine_of(policy, 4 * size, ())
        requests = requests_of(size, prompts=(0, 1, 2, 4))
        with CountOperations() as counter:
            engine.generate(requests, dataclasses.replace(SAMPLED, max_new_tokens=12), 0)
        counts.append(counter.count)
    assert counts[1] < 1.3 * counts[0]


def cut_short(request: Request, trajectory: Trajectory, count: int, version: int) -> Request:
    """The request as it comes back after `count` of the trajectory's tokens, drawn under `version`."""
    start = len(request.token_ids)
    if isinstance(trajectory, TruncatedTrajectory):
        counts = trajectory.kept_counts[start : start + count]
        untruncated, kept_ids = trajectory.untruncated_logprobs, trajectory.kept_ids[: counts.sum()]
    else:
        counts, kept_ids = np.zeros(count, np.int32), NO_SAMPLES.kept_ids
        untruncated = trajectory.sampler_logprobs
    return dataclasses.replace(
        request,
        sampled=Samples(
            token_ids=trajectory.token_ids[start : start + count],
            logprobs=trajectory.sampler_logprobs[start : start + count],
            untruncated_logprobs=untruncated[start : start + count],
            kept_counts=counts,
            kept_ids=kept_ids,
        ),
        version_spans=(VersionSpan(start=start, policy_version=version),) if count else (),
    )


@pytest.mark.parametrize(("num_pages", "prefill_tokens"), [(4, 40), (5, 3), (6, 5), (11, 40), (None, 4)])
def test_pages_and_chunks_change_nothing(policy: DeepseekV4, num_pages: int | None, prefill_tokens: int) -> None:
    """A page is 8 tokens here, and the longest sequence takes all 4 pages of the smallest cache."""
    requests = requests_of(3, (3, 0, 5, 2, 7))
    expected = engine_of(policy, 15).generate(requests, SAMPLED, 0)
    engine = V4Engine(
        policy,
        num_slots=6,
        max_tokens=MAX_TOKENS,
        stop_ids=[STOP],
        seed=SEED,
        prefill_tokens=prefill_tokens,
        num_pages=num_pages,
    )
    shuffled = random.Random(prefill_tokens).sample(requests, len(requests))
    for order in (requests, shuffled):
        assert_same(engine.generate(order, SAMPLED, 0), expected)
        assert engine.cache.free_pages == engine.cache.num_pages
        assert engine.preemptions > 0 or num_pages in (11, None)
        if num_pages is None:  # prompts are read once, wherever their samples stand in the list
            assert engine.prefilled_tokens == sum(PROMPT_LENGTHS[index] for index in (3, 0, 5, 2, 7))


def test_a_cache_below_one_sequence_is_refused(policy: DeepseekV4) -> None:
    with pytest.raises(ValueError, match="num_pages=3 is too small: a sequence of 32 tokens needs 4"):
        V4Engine(policy, num_slots=2, max_tokens=MAX_TOKENS, stop_ids=[], seed=0, num_pages=3)
    assert pages_of(policy, 5, MAX_TOKENS, None) is None
    fixed = policy.new_cache(6, MAX_TOKENS, 0).num_bytes()
    page = policy.new_cache(6, MAX_TOKENS, 1).num_bytes() - fixed
    with pytest.raises(ConfigError, match=rf"rollout.cache_bytes={fixed + 4 * page - 1} .*need {fixed} .* {4 * page} "):
        pages_of(policy, 5, MAX_TOKENS, fixed + 4 * page - 1)
    for pages in (4, 7, 24):
        assert pages_of(policy, 5, MAX_TOKENS, fixed + pages * page + page // 2) == pages
    assert pages_of(policy, 5, MAX_TOKENS, 10**12) == 24


@pytest.mark.parametrize("sampling", [SAMPLED, TRUNCATED], ids=["sampled", "truncated"])
def test_a_resumed_request_is_the_unbroken_one(policy: DeepseekV4, sampling: SamplingConfig) -> None:
    requests = requests_of(2)
    whole = engine_of(policy, 7).generate(requests, sampling, 1)
    for seed in range(2):
        counts = [random.Random(seed * 100 + i).randint(0, t.num_loss_tokens) for i, t in enumerate(whole)]
        broken = [cut_short(r, t, count, 1) for r, t, count in zip(requests, whole, counts, strict=True)]
        engine = engine_of(policy, 5)
        assert_same(engine.generate(broken, sampling, 1), whole)
        # Only what is missing is drawn, and only what goes on is read.
        going = [r for r, t, n in zip(broken, whole, counts, strict=True) if n < t.num_loss_tokens]
        prompts = {request.token_ids: len(request.token_ids) for request in going}
        assert engine.prefilled_tokens == sum(prompts.values()) + sum(len(request.sampled) for request in going)
        for t, request, count in zip(engine.generate(broken, sampling, 4), whole, counts, strict=True):
            start = len(t.token_ids) - t.num_loss_tokens
            spans = [VersionSpan(start=start, policy_version=1)] if count else []
            if count < request.num_loss_tokens:
                spans.append(VersionSpan(start=start + count, policy_version=4))
            assert list(t.version_spans) == spans


def test_a_request_may_have_a_limit_of_its_own(policy: DeepseekV4) -> None:
    limits = (1, 3, 5, 100)
    requests = [dataclasses.replace(r, max_new_tokens=limits[i % 4]) for i, r in enumerate(requests_of(4, (0, 3, 5)))]
    for request, t in zip(requests, engine_of(policy, 5, ()).generate(requests, SAMPLED, 0), strict=True):
        assert request.max_new_tokens is not None
        assert t.num_loss_tokens == min(request.max_new_tokens, SAMPLED.max_new_tokens)
    with pytest.raises(ValueError, match="request 0#0@test asks for 0 tokens"):
        engine_of(policy, 5).generate([dataclasses.replace(requests[0], max_new_tokens=0)], SAMPLED, 0)


def test_nobody_waits_for_a_long_prompt(policy: DeepseekV4, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has read its prompt goes on while another is read, in chunks that are within the budget."""
    calls: list[list[tuple[int, int]]] = []  # rows and columns of each part

    def seen(model: DeepseekV4, cache: Cache) -> Extend:
        extend = stepper(model, cache)

        def step(parts: Sequence[Part], records: Sequence[torch.Tensor] = ()) -> torch.Tensor:
            calls.append([(len(token_ids), token_ids.shape[1]) for token_ids, _ in parts])
            return extend(parts, records)

        return step

    monkeypatch.setattr("rollout.engine.stepper", seen)
    engine = V4Engine(policy, num_slots=4, max_tokens=MAX_TOKENS, stop_ids=[], seed=SEED, prefill_tokens=7)
    long = dataclasses.replace(SAMPLED, max_new_tokens=12)
    engine.generate(requests_of(1, (0, 1, 5)), long, 0)
    assert max(rows * columns for (rows, columns) in itertools.chain(*calls)) <= 7
    both = [call for call in calls if len(call) == 2]
    assert len(both) >= 2 and all(decoding[1] == 1 < reading[1] for decoding, reading in both)


# ---- models of the hub -----------------------------------------------------------------------------------------------


def hub_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    match kind:
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False)).eval()
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()
        case _:  # window-only and full layers, scaled embeddings
            layers = ["sliding_attention", "full_attention", "sliding_attention"]
            config = Gemma3TextConfig(**shape, sliding_window=6, layer_types=layers, query_pre_attn_scalar=8)
            return Gemma3ForCausalLM(config).eval()


@torch.inference_mode()
def hub_logits(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].double().tolist()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_hub_engine_is_the_slow_oracle(kind: str) -> None:
    model = hub_model(kind)
    requests = requests_of(2)
    stop_ids = [STOP, 5, 9, 17]
    for sampling, num_slots in ((SAMPLED, 5), (GREEDY, 16), (TRUNCATED, 3)):
        engine = HubEngine(HubModel(model), num_slots=num_slots, max_tokens=MAX_TOKENS, stop_ids=stop_ids, seed=SEED)
        produced = engine.generate(requests, sampling, 0)
        assert_is_oracles(produced, requests, sampling, lambda ids: hub_logits(model, ids), stop_ids)
        if sampling is SAMPLED:
            assert {t.finish_reason for t in produced} == {"stop", "length"}
            assert len({t.num_loss_tokens for t in produced}) > 2
    too_long = Request(trajectory_id="x", prompt_id="p", domain="d", token_ids=(3,) * MAX_TOKENS)
    with pytest.raises(ValueError, match="prompt p has 32 tokens; the engine takes 1 to 31"):
        engine.generate([too_long], SAMPLED, 0)
    assert engine.generate([], SAMPLED, 0) == []


# ---- workers and the fleet -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two V4 checkpoints of one architecture."""
    folders = [tmp_path_factory.mktemp("policies") / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        save_checkpoint(folder, v4(seed=10 + seed), None)
    return str(folders[0]), str(folders[1])


def worker_of(
    path: str, store: LocalStore | None = None, family: str = "deepseek_v4", fp4: str = "experts"
) -> RolloutWorker:
    return RolloutWorker(
        ModelConfig(family=family, path=path, max_tokens=MAX_TOKENS, fp4=fp4),
        RolloutConfig(num_slots=6),
        store or LocalStore(),
        stop_ids=[STOP],
        seed=SEED,
        device="cpu",
    )


def state_of(worker: RolloutWorker) -> dict[str, torch.Tensor]:
    plain = {name: tensor.clone() for name, tensor in named_weights(worker.policy).items()}
    return plain | {name: dequantize(weight.packed()) for name, weight in packed_weights(worker.policy).items()}


def test_worker_samples_only_under_the_version_it_holds(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    with pytest.raises(ValueError, match="asked to sample under policy version 0; this worker holds -1"):
        worker.generate(requests_of(1), SAMPLED, 0)
    store = LocalStore()
    assert worker.load(store.put(snapshot_of(v4(seed=11, fp4="experts"), 3, "experts"))) == 3
    with pytest.raises(ValueError, match="policy version 2; this worker holds 3"):
        worker.generate(requests_of(1), SAMPLED, 2)
    assert {t.version_spans[0].policy_version for t in worker.generate(requests_of(1), SAMPLED, 3)} == {3}


def test_checkpoint_and_snapshot_are_the_same_policy_bit_for_bit(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    learner = v4(seed=11, fp4="experts")  # what the second checkpoint was saved from
    worker.load(snapshot_of(learner, 3, "experts"))
    published = state_of(worker)
    assert worker.load_checkpoint(checkpoints[0], 4) == 4
    assert any(not torch.equal(tensor, published[name]) for name, tensor in state_of(worker).items())
    assert worker.load_checkpoint(checkpoints[1], 5) == 5
    loaded = state_of(worker)
    masters = named_weights(learner)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, published[name]), name
        packed = is_fp4_name(name, tuple(tensor.shape), "experts")
        assert torch.equal(tensor, masters[name]) != packed, name  # experts were rounded, nothing else was
    # The learner's forward rounds its masters to the very values the worker holds.
    ids, lengths = torch.tensor([prompt_of(5)]), torch.tensor([20])
    with torch.no_grad():
        torch.testing.assert_close(
            worker.policy(ids, lengths).hidden, learner.eval()(ids, lengths).hidden, rtol=0, atol=1e-5
        )


def test_worker_holds_its_experts_as_packed_bytes_only(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    packed = packed_weights(worker.policy)
    whole = named_weights(v4(seed=11))
    assert packed.keys() == {name for name in whole if is_fp4_name(name, tuple(whole[name].shape), "experts")}
    assert named_weights(worker.policy).keys() == whole.keys() - packed.keys()
    elements = sum(whole[name].numel() for name in packed)
    assert elements / 2 <= sum(buffer.nbytes for weight in packed.values() for buffer in weight.buffers()) < elements
    learner = v4(seed=11, fp4="experts")
    for version in (3, 4):
        snapshot = snapshot_of(learner, version, "experts")
        worker.load(snapshot)
        for name, weight in packed.items():
            published, held = snapshot.tensors[name], weight.packed()
            assert isinstance(published, Fp4Tensor) and torch.equal(held.codes, published.codes)
            assert torch.equal(held.scales, published.scales)
            learner.get_parameter(name).data.mul_(-3.0)
    before, name = state_of(worker), next(iter(packed))
    plain = snapshot_of(learner, 5, "experts")
    plain.tensors[name] = torch.zeros(packed[name].shape)
    with pytest.raises(ValueError, match="is torch.float32, the model's is packed FP4"):
        worker.load(plain)
    assert all(torch.equal(tensor, before[other]) for other, tensor in state_of(worker).items())


def test_probe_is_the_log_prob_that_sampling_records(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    worker.load_checkpoint(checkpoints[1], 0)
    produced = worker.generate(requests_of(1), SAMPLED, 0)
    probe = worker.probe([trajectory.token_ids.tolist() for trajectory in produced])
    assert probe.dtype == np.float32 and (probe < 0).all()
    at = 0
    for trajectory in produced:
        length, start = len(trajectory.token_ids), int(trajectory.loss_mask.argmax())
        found = probe[at + start - 1 : at + length - 1]
        np.testing.assert_allclose(found, trajectory.sampler_logprobs[start:], rtol=0, atol=1e-4)
        at += length - 1
    assert at == len(probe)


def test_a_snapshot_that_does_not_fit_changes_nothing(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    worker.load_checkpoint(checkpoints[0], 1)
    before = state_of(worker)
    snapshot = snapshot_of(v4(seed=11), 2, "experts")
    del snapshot.tensors["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"policy version 2 lacks 1 tensors .*'model.layers.1.mlp.experts.down_proj'"):
        worker.load(snapshot)
    assert worker.version == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(worker).items())
    assert len(worker.generate(requests_of(1), SAMPLED, 1)) == len(PROMPT_LENGTHS)


@pytest.mark.parametrize("fp4", ["none", "linears"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_worker_serves_models_of_the_hub(tmp_path: Path, kind: str, fp4: str) -> None:
    """Packed linears in the place of plain ones, ragged prompts, rows that end one by one: the tokens are those of one
    whole reading after another by the learner's own forward, which rounds its masters."""
    hub_model(kind).save_pretrained(tmp_path)
    learner = load_hub_model(str(tmp_path), fp4=fp4)
    worker = worker_of(str(tmp_path), family="hf", fp4=fp4)
    num_packed = sum(isinstance(module, Fp4Linear) for module in worker.policy.modules())
    assert num_packed == (3 * 7 if fp4 == "linears" else 0)  # of every layer: q, k, v, o, gate, up, down
    worker.load(snapshot_of(learner, 3, fp4))

    @torch.inference_mode()
    def logits_after(token_ids: list[int]) -> list[float]:
        hidden = learner(torch.tensor([token_ids]), torch.tensor([len(token_ids)])).hidden[0, -1]
        return (learner.head.double() @ hidden.double()).tolist()

    requests = requests_of(2)
    for sampling in (SAMPLED, ALL_CUTS):
        produced = worker.generate(requests, sampling, 3)
        assert_is_oracles(produced, requests, sampling, logits_after, [STOP])
        for trajectory in produced:
            assert_kept_is_oracles(trajectory, sampling, logits_after)
    (plain,) = worker.generate(requests[6:7], SAMPLED, 3)
    probe, start = worker.probe([plain.token_ids.tolist()]), len(requests[6].token_ids)
    np.testing.assert_allclose(probe[start - 1 :], plain.sampler_logprobs[start:], rtol=0, atol=1e-4)


@pytest.fixture
def fleets(checkpoints: tuple[str, str]) -> Iterator[Callable[[int], Fleet]]:
    with open_runtime(RuntimeConfig(kind="local")) as runtime:

        def hire(num_workers: int) -> Fleet:
            settings = {"stop_ids": [STOP], "seed": SEED, "device": "cpu"}
            model = ModelConfig(path=checkpoints[0], max_tokens=MAX_TOKENS)
            workers = [
                runtime.spawn(
                    RolloutWorker, model, RolloutConfig(num_slots=6), runtime.store, name=f"worker {index}", **settings
                )
                for index in range(num_workers)
            ]
            fleet = Fleet(workers, timeout_seconds=60.0)
            assert fleet.load_checkpoint(checkpoints[0], 0) == 0
            return fleet

        yield hire


def fleet_prompt(index: int) -> Prompt:
    return Prompt(
        id=f"d/train/{index}", domain="d", effort="none", token_ids=prompt_of(index), reference={"answer": str(index)}
    )


def flat(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


@pytest.mark.parametrize(("num_workers", "sampling"), [(2, SAMPLED), (3, SAMPLED), (2, ALL_CUTS)])
def test_number_of_workers_changes_nothing(
    fleets: Callable[[int], Fleet], num_workers: int, sampling: SamplingConfig
) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2, 6)]
    alone = fleets(1).generate(prompts, 3, sampling, version=0, tag="grpo/7")
    groups = fleets(num_workers).generate(prompts, 3, sampling, version=0, tag="grpo/7")
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in prompts]
    for group in groups:
        assert [t.id for t in group.trajectories] == [f"{group.prompt.id}#{k}@grpo/7" for k in range(3)]
        for trajectory in group.trajectories:
            assert (trajectory.prompt_id, trajectory.domain) == (group.prompt.id, "d")
            assert tuple(trajectory.token_ids[~trajectory.loss_mask]) == group.prompt.token_ids
    assert_same(flat(groups), flat(alone))
    again = fleets(num_workers).generate(prompts, 3, sampling, version=0, tag="grpo/8")
    assert sum(a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(flat(again), flat(alone), strict=True)) < 4


def test_a_prompt_asked_for_twice_gets_fresh_samples(fleets: Callable[[int], Fleet]) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 3, 3)]
    groups = fleets(2).generate(prompts, 2, SAMPLED, version=0, tag="t")
    ids = [[t.id.split("@")[0].split("#")[1] for t in group.trajectories] for group in groups]
    assert ids == [["0", "1"], ["0", "1"], ["2", "3"], ["4", "5"]]
    tokens = {tuple(t.token_ids.tolist()) for index in (0, 2, 3) for t in groups[index].trajectories}
    assert len(tokens) == 6


def test_fewer_prompts_than_workers_and_a_new_version(fleets: Callable[[int], Fleet]) -> None:
    fleet = fleets(3)
    assert fleet.generate([], 2, SAMPLED, version=0, tag="t") == []
    before = flat(fleet.generate([fleet_prompt(3)], 2, SAMPLED, version=0, tag="t"))
    assert fleet.load(snapshot_of(v4(seed=11), 1, "experts")) == 1  # a local store's handle is the value
    with pytest.raises(ValueError, match="policy version 0; this worker holds 1"):
        fleet.generate([fleet_prompt(3)], 2, SAMPLED, version=0, tag="t")
    after = flat(fleet.generate([fleet_prompt(3)], 2, SAMPLED, version=1, tag="t"))
    assert [t.token_ids.tolist() for t in after] != [t.token_ids.tolist() for t in before]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("wal", "disk", "rollout.wal=disk is not allowed; choose one of none, process, machine"),
        ("cache_bytes", 0, "rollout.cache_bytes=0 is too small"),
        ("prefill_tokens", 0, "rollout.prefill_tokens=0 is too small"),
        ("min_p", 1.0, r"rollout.sampling.min_p=1.0 is not in \[0, 1\)"),
        ("min_p", 0.1, r"min_p=0.1 .*must be off .*stages.grpo.steps > 0"),
    ],
)
def test_settings_that_are_refused(key: str, value: object, message: str) -> None:
    config = Config(run=RunConfig(name="test"), data=DataConfig(domains={"d": DomainConfig(task="chain_sum")}))
    check_config(config)
    setattr(config.rollout.sampling if key == "min_p" else config.rollout, key, value)
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_the_cache_of_a_hub_model_takes_no_settings() -> None:
    config = Config(run=RunConfig(name="test"), data=DataConfig(domains={"d": DomainConfig(task="chain_sum")}))
    config.model = ModelConfig(family="hf", path="x", fp4="none")
    check_config(config)
    for key, value in (("cache_bytes", 10**9), ("prefill_tokens", 100)):
        changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **{key: value}))
        with pytest.raises(ConfigError, match=rf"rollout.{key}={value} would be ignored: model.family=hf"):
            check_config(changed)


class Crooked(RolloutWorker):
    """Loads weights of which one is off."""

    def load(self, snapshot: object) -> int:
        version = super().load(snapshot)
        with torch.no_grad():
            self.policy.head[7] *= 1.02
        return version


def test_a_publish_that_went_wrong_stops_the_run(checkpoints: tuple[str, str]) -> None:
    model, settings = ModelConfig(path=checkpoints[0], max_tokens=MAX_TOKENS), {"stop_ids": [STOP], "seed": SEED}
    learner = v4(seed=11, fp4="experts").eval()
    snapshot = snapshot_of(learner, 5, "experts")
    reference = []
    for prompt in PROBES:
        for end in range(1, len(prompt)):
            logits = torch.tensor(v4_logits(learner, list(prompt[:end])))
            reference.append(logits.log_softmax(-1)[prompt[end]].item())
    with open_runtime(RuntimeConfig(kind="local")) as runtime:
        workers = [
            runtime.spawn(cls, model, RolloutConfig(), runtime.store, name=f"worker {i}", device="cpu", **settings)
            for i, cls in enumerate((RolloutWorker, RolloutWorker, Crooked))
        ]
        good = Fleet(workers[:2], 60.0)
        assert good.load(snapshot) == good.load(snapshot, np.array(reference, np.float32)) == 5
        with pytest.raises(
            RuntimeError, match=r"worker 0 does not hold .* from those of the learner by up to 0\.5 nats"
        ):
            good.load(snapshot, np.array([*reference[:-1], reference[-1] + 0.5], np.float32))
        with pytest.raises(RuntimeError, match="worker 0 does not hold .* by up to nan nats"):
            good.load(snapshot, np.array([*reference[:-1], math.nan], np.float32))
        bad = Fleet(workers, 60.0)
        with pytest.raises(RuntimeError, match="worker 2 does not hold .* differ from those of worker 0 by up to"):
            bad.load(snapshot)
        assert Fleet(workers, 60.0, probe_tolerance=10.0).load(snapshot) == 5


# ---- workers that die ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for the end of a process that runs inside this one."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    value: Any = None
    error: Exception | None = None

    def result(self, timeout_seconds: float | None = None) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class Mortal:
    """An actor whose object may die in a call, and says so as the Ray runtime does."""

    def __init__(self, name: str, worker: RolloutWorker) -> None:
        self.name, self.worker, self.dead, self.methods = name, worker, False, []

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Outcome:
        self.methods.append(method)
        try:
            if not self.dead:
                return Outcome(value=getattr(self.worker, method)(*args, **kwargs))
        except Killed:
            self.dead = True
        except Exception as error:
            return Outcome(error=error)
        return Outcome(error=ActorDied(self.name, f"before or during {method}: gone"))


@dataclasses.dataclass
class Deaths:
    """Ends a worker at given decoding steps of its lives, and counts the tokens that were drawn."""

    steps: list[int]  # of each life that ends: steps it logs before
    manner: str  # before: the last step is not logged | after: it is | torn: part of it is
    tokens: int = 0

    def append(self, log: Log, owners: np.ndarray, *rest: Any) -> None:
        if self.steps:
            self.steps[0] -= 1
        dies = bool(self.steps) and self.steps[0] < 0
        if not dies or self.manner == "after":
            LOG_APPEND(log, owners, *rest)
            self.tokens += len(owners)
        if dies:
            del self.steps[0]
            if self.manner == "torn":
                with open(log.path, "ab") as file:
                    file.write(bytes([24, 0, 0, 0, 3]))
            raise Killed


LOG_APPEND = Log.append


def mortal_fleet(
    folder: Path,
    path: str,
    num_workers: int,
    *,
    wal: str = "process",
    log_dir: str | None = "wal",
    stop_ids: Sequence[int] = (STOP,),
    **of_model: Any,
) -> Fleet:
    settings = RolloutConfig(num_slots=6, wal=wal)
    model = ModelConfig(path=path, **{"max_tokens": MAX_TOKENS, **of_model})

    def hire(index: int) -> Mortal:
        worker = RolloutWorker(model, settings, LocalStore(), stop_ids=stop_ids, seed=SEED, device="cpu")
        return Mortal(f"rollout worker {index}", worker)

    workers = [hire(index) for index in range(num_workers)]
    return Fleet(workers, 60.0, respawn=hire, log_dir=None if log_dir is None else str(folder / log_dir))


@pytest.mark.parametrize("manner", ["before", "after", "torn"])
def test_a_dead_worker_is_replaced_and_no_token_is_drawn_twice(
    checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2, 6)]
    unbroken = mortal_fleet(tmp_path / "unbroken", checkpoints[0], 2)
    snapshot = snapshot_of(v4(seed=11), 4, "experts")
    unbroken.load(snapshot)
    expected = flat(unbroken.generate(prompts, 3, SAMPLED, version=4, tag="t"))

    def used_fleet() -> Fleet:
        fleet = mortal_fleet(tmp_path, checkpoints[0], 2)
        fleet.load(snapshot)
        fleet.generate(prompts[:1], 1, SAMPLED, version=4, tag="t")
        return fleet

    used_fleet()  # an earlier fleet and an earlier batch leave logs that have nothing to do with the next one
    fleet = used_fleet()
    deaths = Deaths([2, 0, 5, 0, 3], manner)
    monkeypatch.setattr(Log, "append", lambda log, *rest: deaths.append(log, *rest))
    produced = flat(fleet.generate(prompts, 3, SAMPLED, version=4, tag="t"))
    assert_same(produced, expected)
    assert not deaths.steps and fleet.num_deaths == 5
    assert deaths.tokens == sum(t.num_loss_tokens for t in expected)  # each was drawn and logged once
    assert fleet.resumed_tokens > 0
    names = [
        "rollout_worker_0.wal",
        "rollout_worker_0.wal.4",
        "rollout_worker_1.wal",
    ]  # .4: what the first fleet was at
    assert sorted(os.listdir(tmp_path / "wal")) == names
    logs = [read_log(tmp_path / "wal" / names[index]) for index in (0, 2)]
    assert [log.worker for log in logs if log] == ["rollout worker 0", "rollout worker 1"]
    assert {log.torn_bytes for log in logs if log} == {0} and {log.run for log in logs if log} == {fleet.run}
    assert {reason for log in logs if log for reason in log.reasons} <= {"stop", "length"}
    # The next batch has nothing to do with it.
    again = fleet.generate(prompts[:2], 2, SAMPLED, version=4, tag="t")
    first = [t for t in expected if t.id in {other.id for other in flat(again)}]
    assert_same(flat(again), first)


def test_deaths_between_batches_and_without_a_log(
    checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 5)]
    fleet = mortal_fleet(tmp_path, checkpoints[0], 2, log_dir=None)
    for worker in fleet.workers:
        cast(Mortal, worker).dead = True  # before any weights
    snapshot = snapshot_of(v4(seed=11), 4, "experts")
    assert fleet.load(snapshot) == 4 and fleet.num_deaths == 2
    expected = flat(fleet.generate(prompts, 2, SAMPLED, version=4, tag="t"))
    cast(Mortal, fleet.workers[1]).dead = True
    assert_same(flat(fleet.generate(prompts, 2, SAMPLED, version=4, tag="t")), expected)
    assert cast(Mortal, fleet.workers[1]).methods == ["load", "probe", "logged_tokens", "generate"]
    monkeypatch.setattr(RolloutWorker, "_apply", lambda *_: (_ for _ in ()).throw(Killed()))
    cast(Mortal, fleet.workers[0]).dead = True
    with pytest.raises(RuntimeError, match="rollout worker 0 died 4 times in a row without producing a token"):
        fleet.generate(prompts, 2, SAMPLED, version=4, tag="t")
    monkeypatch.setattr(RolloutWorker, "_apply", lambda *_: (_ for _ in ()).throw(ActorDied("learner rank 0", "gone")))
    with pytest.raises(ActorDied, match="learner rank 0 died, gone"):  # which is no reason to replace the worker
        mortal_fleet(tmp_path, checkpoints[0], 2).load(snapshot)
    lonely = Fleet([Mortal("rollout worker 9", cast(Any, None))], 60.0)
    cast(Mortal, lonely.workers[0]).dead = True
    with pytest.raises(RuntimeError, match="rollout worker 9 died, before or during load: gone"):
        lonely.load(snapshot)


def broken_off(fleet: Fleet, prompts: Sequence[Prompt], steps: int, **asked: Any) -> int:
    """Ends a fleet with its first worker's death after so many steps; the tokens that its logs hold then."""
    deaths = Deaths([steps], "after")
    fleet.respawn = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "append", lambda log, *rest: deaths.append(log, *rest))
        with pytest.raises(ActorDied):
            fleet.generate(prompts, 3, SAMPLED, **asked)
    return deaths.tokens


def counted(fleet: Fleet, prompts: Sequence[Prompt], sampling: SamplingConfig, **asked: Any) -> tuple[Any, int]:
    """Trajectories, and how many of their tokens were drawn for them."""
    drawn = Deaths([], "after")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "append", lambda log, *rest: drawn.append(log, *rest))
        return flat(fleet.generate(prompts, 3, sampling, **asked)), drawn.tokens


def test_the_next_fleet_goes_on_from_what_the_last_one_logged(
    checkpoints: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run ends in the middle of a batch. The one after it draws what is missing; under other weights, with another
    sampling, prompt or architecture, or from a damaged log, it draws everything."""
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2, 6)]
    changed = [*prompts[:4], dataclasses.replace(prompts[4], token_ids=(3, 4, 5))]
    snapshot, other = (snapshot_of(v4(seed=seed), 4, "experts") for seed in (11, 12))
    hotter = dataclasses.replace(SAMPLED, temperature=1.3)
    shorter = dataclasses.replace(SAMPLED, max_new_tokens=5)
    asked: dict[str, Any] = {"version": 4, "tag": "t"}

    def fleet_with(weights: WeightSnapshot, folder: Path, **settings: Any) -> Fleet:
        fleet = mortal_fleet(folder, checkpoints[0], 2, **settings)
        fleet.load(weights)
        return fleet

    for name, weights, sampling, of, settings in (
        ("same", snapshot, SAMPLED, prompts, {}),
        ("other weights", other, SAMPLED, prompts, {}),
        ("hotter", snapshot, hotter, prompts, {}),
        ("shorter", snapshot, shorter, prompts, {}),
        ("changed", snapshot, SAMPLED, changed, {}),
        ("stop", snapshot, SAMPLED, prompts, {"stop_ids": (STOP, 7)}),
        ("context", snapshot, SAMPLED, prompts, {"max_tokens": MAX_TOKENS - 8}),
        ("unpacked", snapshot, SAMPLED, prompts, {"fp4": "none"}),
        ("damaged", snapshot, SAMPLED, prompts, {}),
    ):
        folder = tmp_path / name
        expected, total = counted(fleet_with(weights, folder / "unbroken", **settings), of, sampling, **asked)
        logged = broken_off(fleet_with(snapshot, folder), prompts, 4, **asked)
        if name == "damaged":
            for log in (folder / "wal").iterdir():
                data = bytearray(log.read_bytes())
                data[-30] ^= 4
                log.write_bytes(data)
        caplog.clear()
        fleet = fleet_with(weights, folder, **settings)
        found, drawn = counted(fleet, of, sampling, **asked)
        assert_same(found, expected)
        if name == "changed":
            assert total - logged < drawn < total
        else:
            assert logged > 0 and drawn == (total - logged if name == "same" else total)
        assert ("tokens that an earlier run logged" in caplog.text) == (name in ("same", "changed"))
        assert ("was changed" in caplog.text) == (name == "damaged")
        names = [f"rollout_worker_{index}.wal" for index in range(2)]
        beside = [f"{path}.{'damaged' if name == 'damaged' else '4'}" for path in names]
        assert sorted(os.listdir(folder / "wal")) == sorted(names + beside)
        # Another batch of the same version has nothing of it, and the next version nothing to come back to.
        found, drawn = counted(fleet, of, sampling, version=4, tag="u")
        assert drawn == sum(t.num_loss_tokens for t in found)
        fleet.load(dataclasses.replace(weights, policy_version=5))
        fleet.generate(prompts, 1, SAMPLED, version=5, tag="t")
        assert sorted(os.listdir(folder / "wal")) == sorted(names + (beside if name == "damaged" else []))


def test_a_fleet_takes_up_logs_when_it_comes_to_their_step(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    """A run that ended at step 6 goes on at step 5, ends there too, and goes on once more; at step 3 it never was."""
    prompts = [fleet_prompt(index) for index in (3, 0, 5)]
    weights = {step: snapshot_of(v4(seed=step), step, "experts") for step in (5, 6, 7)}
    folder = tmp_path / "wal"

    def at(fleet: Fleet, step: int) -> dict[str, Any]:
        fleet.load(weights[step])
        return {"version": step, "tag": f"t/{step}"}

    expected, totals = {}, {}
    for step in (5, 6):
        fleet = mortal_fleet(tmp_path / "unbroken", checkpoints[0], 1)
        expected[step], totals[step] = counted(fleet, prompts, SAMPLED, **at(fleet, step))
    logged = {}
    for step in (6, 5):
        fleet = mortal_fleet(tmp_path, checkpoints[0], 1)
        logged[step] = broken_off(fleet, prompts, 3, **at(fleet, step))
    mortal_fleet(tmp_path, checkpoints[0], 1)  # one that ends before it samples anything
    (folder / "rollout_worker_0.wal").write_bytes(bytes(100))  # of zeros: the machine went down
    fleet = mortal_fleet(tmp_path, checkpoints[0], 1)
    assert sorted(os.listdir(folder)) == ["rollout_worker_0.wal.5", "rollout_worker_0.wal.6"]
    for step in (5, 6):
        found, drawn = counted(fleet, prompts, SAMPLED, **at(fleet, step))
        assert_same(found, expected[step])
        assert drawn == totals[step] - logged[step]
    fleet.generate(prompts, 1, SAMPLED, **at(fleet, 7))
    assert os.listdir(folder) == ["rollout_worker_0.wal"]
    # Files of others beside them are left alone; in their place they are named.
    (folder / "rollout_worker_0.wal.3").mkdir()
    (folder / "rollout_worker_0.wal.4").write_text("a diary")
    fleet.generate(prompts, 1, SAMPLED, **at(fleet, 7))
    assert len(os.listdir(folder)) == 3
    (folder / "rollout_worker_0.wal.7").write_text("a diary")
    with pytest.raises(LogDamaged, match=r"rollout_worker_0\.wal\.7 is in the way: it is not a write-ahead log"):
        mortal_fleet(tmp_path, checkpoints[0], 1)
    (folder / "rollout_worker_0.wal").unlink()
    (folder / "rollout_worker_0.wal").mkdir()
    with pytest.raises(LogDamaged, match=r"rollout_worker_0\.wal is in the way: Is a directory"):
        mortal_fleet(tmp_path, checkpoints[0], 1)


def flipped(log: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(log))
    return log[:place] + bytes([log[place] ^ 1 << rng.randrange(8)]) + log[place + 1 :]


def cut(log: bytes, rng: random.Random) -> bytes:
    return log[: rng.randrange(len(log))]


def of_another_fleet(log: bytes, rng: random.Random) -> bytes:
    """A whole and sound log, of the same worker and batch of another run."""
    return OTHER_LOGS[0]


OTHER_LOGS: list[bytes] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, r"the (head of the )?frame at byte \d+ was changed|is not a write-ahead log of this program's"),
        (
            of_another_fleet,
            r"is the log of batch 1 of 'rollout worker 0' in run '\w+', not of batch 1 of .* in run '\w+'",
        ),
        (lambda log, rng: b"a diary", "is not a write-ahead log of this program's: it begins with b'a diary'"),
        (cut, None),
        (lambda log, rng: b"", None),
    ],
    ids=["flipped", "of_another_fleet", "no_log", "cut", "empty"],
)
def test_what_becomes_of_a_log_between_two_lives(
    checkpoints: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes, random.Random], bytes],
    message: str | None,
) -> None:
    """Damage is found and named and nothing is sampled over it; a log cut anywhere serves with what is left of it."""
    prompts = [fleet_prompt(index) for index in (3, 0)]

    def fleet_in(folder: Path) -> Fleet:
        fleet = mortal_fleet(folder, checkpoints[0], 1)
        fleet.load_checkpoint(checkpoints[0])
        return fleet

    expected = flat(fleet_in(tmp_path / "other").generate(prompts, 2, SAMPLED, version=0, tag="t"))
    OTHER_LOGS[:] = [(tmp_path / "other" / "wal" / "rollout_worker_0.wal").read_bytes()]
    path = tmp_path / "wal" / "rollout_worker_0.wal"
    for trial in range(6):
        fleet, deaths = fleet_in(tmp_path), Deaths([3], "after")
        found: list[bytes] = []

        def append(
            log: Log, *rest: Any, deaths: Deaths = deaths, trial: int = trial, found: list[bytes] = found
        ) -> None:
            try:
                deaths.append(log, *rest)
            except Killed:
                found.append(damage(Path(log.path).read_bytes(), random.Random(trial)))
                Path(log.path).write_bytes(found[0])
                raise

        with monkeypatch.context() as patch:
            patch.setattr(Log, "append", append)
            if message is None:
                assert_same(flat(fleet.generate(prompts, 2, SAMPLED, version=0, tag="t")), expected)
            else:
                with pytest.raises(LogDamaged, match=rf"rollout_worker_0\.wal:? ({message})"):
                    fleet.generate(prompts, 2, SAMPLED, version=0, tag="t")
        assert found and fleet.num_deaths == 1
        if message is not None:
            assert path.read_bytes() == found[0]  # evidence stays
        path.unlink()
    path.write_text("a diary")
    with pytest.raises(LogDamaged, match=r"rollout_worker_0\.wal is in the way"):
        mortal_fleet(tmp_path, checkpoints[0], 1)
    assert path.read_text() == "a diary"


@pytest.mark.parametrize("wal", ["process", "machine"])
def test_a_full_disk_ends_the_batch_and_loses_nothing(
    checkpoints: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wal: str
) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2)]
    fleet = mortal_fleet(tmp_path, checkpoints[0], 2, wal=wal)
    fleet.load_checkpoint(checkpoints[0])
    expected = {t.id: t for t in flat(fleet.generate(prompts, 2, SAMPLED, version=0, tag="t"))}
    path = tmp_path / "wal" / "rollout_worker_0.wal"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.7, 0.8, 0.9):  # the system takes no byte beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * path.stat().st_size), before[1]))
        try:
            with pytest.raises(RuntimeError, match=r"rollout_worker_0\.wal cannot grow beyond \d+ bytes: .*make room"):
                fleet.generate(prompts, 2, SAMPLED, version=0, tag="t")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log = read_log(path)
        assert log is not None and log.torn_bytes == 0 and log.num_tokens > 0
        for request, samples in zip(log.requests, log.sampled, strict=True):
            whole = expected[request.trajectory_id].token_ids[len(request.token_ids) :].tolist()
            assert samples.token_ids.tolist() == whole[: len(samples)]
        # There is room again: the fleet, none of whose workers died, makes the batch.
        assert_same(flat(fleet.generate(prompts, 2, SAMPLED, version=0, tag="t")), list(expected.values()))
    assert fleet.num_deaths == 0
    # A disk that takes nothing at all, for a replacement that has to write down what it takes over.
    deaths = Deaths([3], "after")
    failing = errno.ENOSPC, os.strerror(errno.ENOSPC)
    monkeypatch.setattr(Log, "append", lambda log, *rest: deaths.append(log, *rest))
    written = Log._write

    def full(log: Log, record: bytes) -> None:
        if not deaths.steps and log.path == str(path):
            raise OSError(*failing)
        written(log, record)

    monkeypatch.setattr(Log, "_write", full)
    with pytest.raises(
        RuntimeError, match=r"rollout_worker_0\.wal cannot be written: No space left on device\..*not lost"
    ):
        fleet.generate(prompts, 2, SAMPLED, version=0, tag="t")
    assert fleet.num_deaths == 1
    log = read_log(path)
    assert log is not None and log.num_tokens == fleet.resumed_tokens > 0
    assert sorted(os.listdir(tmp_path / "wal")) == ["rollout_worker_0.wal", "rollout_worker_1.wal"]


def test_a_death_before_the_first_log_finds_no_older_one(checkpoints: tuple[str, str], tmp_path: Path) -> None:
    expected: list[Trajectory] = []
    for life in range(2):
        fleet = mortal_fleet(tmp_path, checkpoints[0], 1)
        fleet.load_checkpoint(checkpoints[0])
        cast(Mortal, fleet.workers[0]).dead = life == 1
        produced = flat(fleet.generate([fleet_prompt(3)], 2, SAMPLED, version=0, tag="t"))
        assert (fleet.num_deaths, fleet.resumed_tokens) == (life, 0)
        if life:
            assert_same(produced, expected)
        expected = produced


def test_hub_engine_logs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hub_model("qwen3")
    requests = requests_of(2)

    def engine() -> HubEngine:
        return HubEngine(HubModel(model), num_slots=5, max_tokens=MAX_TOKENS, stop_ids=[STOP], seed=SEED)

    for batch, sampling in enumerate((SAMPLED, TRUNCATED)):
        expected = engine().generate(requests, sampling, 0)
        deaths = Deaths([3, 6], "after")
        monkeypatch.setattr(Log, "append", lambda log, *rest, d=deaths: d.append(log, *rest))
        produced = with_deaths(
            engine, requests, sampling, LogKey(path=f"{tmp_path}/w", run="r", worker="w", batch=batch)
        )
        assert_same(produced, expected)
        assert not deaths.steps and deaths.tokens == sum(t.num_loss_tokens for t in expected)


def with_deaths(
    engine: Callable[[], HubEngine | V4Engine], requests: Sequence[Request], sampling: SamplingConfig, key: LogKey
) -> list[Trajectory]:
    """Generates through as many lives as it takes, each of which goes on from the log."""
    while True:
        try:
            found = read_batch(key)
            resumed = requests if found is None else found.resumed(requests, sampling, SEED)
            with Log(key, resumed, sampling, policy_version=0, seed=SEED, durability="process") as log:
                return engine().generate(resumed, sampling, 0, log)
        except Killed:
            continue


def regenerated(
    engine: Callable[[int], V4Engine], requests: Sequence[Request], sampling: SamplingConfig, key: LogKey
) -> list[int]:
    """Lengths from a worker that keeps what had ended when it died, and begins the rest anew with fresh noise."""
    lengths: list[int] = []
    for life in itertools.count():
        try:
            with Log(key, requests, sampling, policy_version=0, seed=SEED, durability="process") as log:
                return lengths + [t.num_loss_tokens for t in engine(life).generate(requests, sampling, 0, log)]
        except Killed:
            found = read_batch(key)
            assert found is not None
            lengths += [len(s) for s, reason in zip(found.sampled, found.reasons, strict=True) if reason is not None]
            requests = [r for r, reason in zip(requests, found.reasons, strict=True) if reason is None]
    raise AssertionError


def test_deaths_leave_the_law_of_lengths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of a policy that stops with probability 0.1 whatever it reads, under a hazard of one death in ten steps.

    Kolmogorov-Smirnov at one in a thousand; the same deaths with restarts from scratch must be told apart.
    """
    model, count, longest, stop = v4(seed=3), 600, 24, 0.1
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=longest)
    requests = [Request(trajectory_id=f"{i}", prompt_id="p", domain="d", token_ids=(2,)) for i in range(count)]
    law = 1 - (1 - stop) ** np.arange(1, longest)

    def engine(seed: int = 0) -> V4Engine:
        return V4Engine(model, num_slots=64, max_tokens=MAX_TOKENS, stop_ids=range(int(stop * VOCAB)), seed=seed)

    def distance(lengths: Sequence[int]) -> float:
        assert len(lengths) == count
        found = np.array([sum(length <= k for length in lengths) for k in range(1, longest)]) / count
        return float(np.abs(found - law).max())

    key = LogKey(path=str(tmp_path / "w.wal"), run="r", worker="w", batch=1)
    allowed = 1.95 / math.sqrt(count)
    for planted in (False, True):
        steps = np.random.default_rng(1).geometric(0.1, 40).tolist()
        deaths = Deaths(steps, "after")
        monkeypatch.setattr(Log, "append", lambda log, *rest, d=deaths: d.append(log, *rest))
        if planted:
            assert distance(regenerated(engine, requests, sampling, key)) > 1.5 * allowed
        else:
            lengths = [t.num_loss_tokens for t in with_deaths(engine, requests, sampling, key)]
            assert distance(lengths) < allowed
            assert lengths == [t.num_loss_tokens for t in engine().generate(requests, sampling, 0)]
        assert len(deaths.steps) < 36


class Visible(RolloutWorker):
    def process(self) -> int:
        return os.getpid()

    def limit_files(self, size: int) -> None:
        """The system takes no byte of a file beyond `size`: what a full disk is to this process."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.ray
def test_kill_9(ray_cluster: Runtime, checkpoints: tuple[str, str], tmp_path: Path) -> None:
    """Real workers are ended in the middle of a batch; what comes out is the unbroken run's. Then a disk is full."""
    model, settings = ModelConfig(path=checkpoints[0], max_tokens=MAX_TOKENS), RolloutConfig(num_slots=6)
    pids: dict[int, Future] = {}

    def hire(index: int) -> Actor:
        worker = ray_cluster.spawn(
            Visible,
            model,
            settings,
            ray_cluster.store,
            stop_ids=[STOP],
            seed=SEED,
            device="cpu",
            name=f"worker {index}",
        )
        pids[index] = worker.submit("process")
        return worker

    fleet = Fleet([hire(index) for index in range(2)], 600.0, respawn=hire, log_dir=str(tmp_path))
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2, 6, 1)]

    def num_logged(index: int) -> int:
        log = read_log(tmp_path / f"worker_{index}.wal")
        return log.num_tokens if log is not None and log.batch == fleet.num_batches else 0

    def batch() -> list[Trajectory]:
        return flat(fleet.generate(prompts, 24, SAMPLED, version=4, tag="t"))

    try:
        fleet.load(ray_cluster.store.put(snapshot_of(v4(seed=11), 4, "experts")))
        expected = batch()
        whole = [num_logged(index) for index in range(2)]
        assert sum(whole) == sum(t.num_loss_tokens for t in expected)

        def kill() -> None:
            for index, share in ((0, 0.2), (1, 0.6)):
                while not share * whole[index] < num_logged(index) < 0.95 * whole[index]:
                    time.sleep(0.002)
                os.kill(pids[index].result(600.0), signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        produced = batch()
        killer.join(60.0)
        assert not killer.is_alive() and fleet.num_deaths == 2
        assert_same(produced, expected)
        assert [num_logged(index) for index in range(2)] == whole
        assert fleet.resumed_tokens > 0.2 * whole[0] + 0.6 * whole[1]

        path = tmp_path / "worker_1.wal"
        fleet.workers[1].submit("limit_files", path.stat().st_size * 4 // 5).result(600.0)
        with pytest.raises(RuntimeError, match=rf"{path} cannot grow beyond \d+ bytes: .*; make room on that disk"):
            batch()
        log, texts = read_log(path), {t.id: t.token_ids[t.loss_mask].tolist() for t in expected}
        assert log is not None and log.torn_bytes == 0 and log.num_tokens > 0
        for request, samples in zip(log.requests, log.sampled, strict=True):
            assert texts[request.trajectory_id][: len(samples)] == samples.token_ids.tolist()
    finally:
        ray_cluster.dismiss(fleet.workers)
