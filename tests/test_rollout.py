"""Rollouts: whatever the batching, the tokens are those of one slow request at a time, and so are the log-probs."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from opd.actors import LocalStore, open_runtime
from opd.config import ModelConfig, RolloutConfig, RuntimeConfig, SamplingConfig
from opd.fp4 import is_fp4_name
from opd.model import HubModel
from opd.model.transformer import DeepseekV4, initialize, v4_config
from opd.types import Group, Prompt, Trajectory, VersionSpan
from opd.weights import named_weights, save_checkpoint, snapshot_of
from rollout.engine import Request, V4Engine
from rollout.fleet import Fleet
from rollout.hub_engine import HubEngine
from rollout.sampling import sample, trajectory_key, uniform
from rollout.worker import RolloutWorker

VOCAB, STOP, MAX_TOKENS, SEED = 40, 1, 32, 11
GOLDEN_KEY, GOLDEN_NOISE = -4530709671718645755, 0.7126465414299984
PROMPT_LENGTHS = (1, 4, 7, 13, 3, 20, 8, 30)  # on both sides of block and window borders; the last leaves room for 2
SAMPLED = SamplingConfig(temperature=1.0, max_new_tokens=8)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)
TRUNCATED = SamplingConfig(temperature=0.7, top_k=12, top_p=0.8, max_new_tokens=8)


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
            most_tokens=min(sampling.max_new_tokens, MAX_TOKENS - len(prompt)),
            stop_ids=stop_ids,
        )
        assert trajectory.id == request.trajectory_id and trajectory.prompt_id == request.prompt_id
        assert trajectory.token_ids.tolist() == prompt + tokens, request.trajectory_id
        np.testing.assert_allclose(trajectory.sampler_logprobs, [0.0] * len(prompt) + logprobs, rtol=0, atol=1e-4)
        assert trajectory.finish_reason == reason
        assert trajectory.loss_mask.tolist() == [False] * len(prompt) + [True] * len(tokens)
        assert (trajectory.token_ids.dtype, trajectory.sampler_logprobs.dtype) == (np.int32, np.float32)


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


def test_the_ends_of_the_interval_are_never_reached_and_never_leave_the_support() -> None:
    keys = torch.tensor([key_for(output, 6) for output in (0, 2**64 - 1)])
    lowest, highest = uniform(keys, torch.full((2,), 6)).tolist()
    assert 0.0 < lowest < 1e-15 and highest == 1.0 - 2**-53
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1, 301, generator=generator) * 3
        logits[:, [0, 300]] = -200.0  # no mass at either end, in float32
        for sampling in (SAMPLED, TRUNCATED):
            tokens, logprobs = sample(logits.expand(2, -1), keys, torch.full((2,), 6), sampling)
            probabilities = oracles.drawn_from(logits[0].tolist(), sampling.temperature, sampling.top_k, sampling.top_p)
            support = [token for token, p in enumerate(probabilities) if p > 1e-9]
            assert tokens.tolist()[0] == support[0] and tokens.tolist()[1] in support[-3:]
            assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 9, 0.75), (1.0, 1, 1.0), (1.0, 0, 1e-6)],
)
def test_draw_is_the_oracles(temperature: float, top_k: int, top_p: float) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(60, 25, generator=torch.Generator().manual_seed(1)) * 2
    logits[30:] = (logits[30:] * 2).round() / 2  # many ties
    keys, positions = torch.arange(60) * 7919 - 30, torch.arange(60) % 5
    tokens, logprobs = sample(logits, keys, positions, sampling)
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        probabilities = oracles.drawn_from(logits[row].tolist(), temperature, top_k, top_p)
        assert token == oracles.draw(probabilities, oracles.noise(int(keys[row]), int(positions[row]))), row
        assert logprob == pytest.approx(math.log(probabilities[token]), abs=1e-5)


def test_draws_have_the_frequencies_of_the_truncated_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 2.0, -3.0, 0.2]])
    count = 20_000
    keys = torch.tensor([trajectory_key(str(i), 0) for i in range(count)])
    tokens, _ = sample(logits.expand(count, -1), keys, torch.zeros_like(keys), SamplingConfig(top_p=0.9, top_k=6))
    expected = np.array(oracles.drawn_from(logits[0].tolist(), 1.0, 6, 0.9)) * count
    found = np.bincount(tokens.numpy(), minlength=8)
    kept = expected > 0
    assert 3 < kept.sum() < 8 and not found[~kept].any()
    assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 22  # five degrees of freedom, below one in 1000


def test_greedy_takes_the_lowest_id_among_equals_and_tells_the_plain_log_prob() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, -1.0, 0.0, 2.0]])
    tokens, logprobs = sample(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), GREEDY)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise(value: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    none = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits are not finite \(row 1\)"):
        sample(logits, none, none, SamplingConfig(temperature=temperature))


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
    monkeypatch.setattr(rollout.engine, "PREFILL_TOKENS", 24)  # prompts are read in several calls
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


# ---- models of the hub -----------------------------------------------------------------------------------------------


def hub_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
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


def worker_of(path: str, store: LocalStore | None = None, family: str = "deepseek_v4") -> RolloutWorker:
    fp4 = "experts" if family == "deepseek_v4" else "none"
    return RolloutWorker(
        ModelConfig(family=family, path=path, max_tokens=MAX_TOKENS, fp4=fp4),
        RolloutConfig(num_slots=6),
        store or LocalStore(),
        stop_ids=[STOP],
        seed=SEED,
        device="cpu",
    )


def state_of(worker: RolloutWorker) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(worker.policy).items()}


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


def test_probe_is_the_distribution_of_the_first_token(checkpoints: tuple[str, str]) -> None:
    worker = worker_of(checkpoints[0])
    worker.load_checkpoint(checkpoints[1], 0)
    for request, trajectory in zip(requests_of(1), worker.generate(requests_of(1), SAMPLED, 0), strict=True):
        probe = worker.probe(request.token_ids)
        assert probe.shape == (VOCAB,) and probe.dtype == torch.float32
        assert probe.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        start = len(request.token_ids)
        assert trajectory.sampler_logprobs[start] == pytest.approx(probe[trajectory.token_ids[start]].item(), abs=1e-4)


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


def test_worker_serves_models_of_the_hub(tmp_path: Path) -> None:
    model = hub_model("qwen3")
    model.save_pretrained(tmp_path)
    worker = worker_of(str(tmp_path), family="hf")
    worker.load_checkpoint(str(tmp_path), 0)
    requests = requests_of(1)
    produced = worker.generate(requests, SAMPLED, 0)
    assert_is_oracles(produced, requests, SAMPLED, lambda ids: hub_logits(model, ids), [STOP])
    probe = worker.probe(requests[3].token_ids)
    assert produced[3].sampler_logprobs[13] == pytest.approx(probe[produced[3].token_ids[13]].item(), abs=1e-4)


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


@pytest.mark.parametrize("num_workers", [2, 3])
def test_number_of_workers_changes_nothing(fleets: Callable[[int], Fleet], num_workers: int) -> None:
    prompts = [fleet_prompt(index) for index in (3, 0, 5, 2, 6)]
    alone = fleets(1).generate(prompts, 3, SAMPLED, version=0, tag="grpo/7")
    groups = fleets(num_workers).generate(prompts, 3, SAMPLED, version=0, tag="grpo/7")
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in prompts]
    for group in groups:
        assert [t.id for t in group.trajectories] == [f"{group.prompt.id}#{k}@grpo/7" for k in range(3)]
        for trajectory in group.trajectories:
            assert (trajectory.prompt_id, trajectory.domain) == (group.prompt.id, "d")
            assert tuple(trajectory.token_ids[~trajectory.loss_mask]) == group.prompt.token_ids
    assert_same(flat(groups), flat(alone))
    again = fleets(num_workers).generate(prompts, 3, SAMPLED, version=0, tag="grpo/8")
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
