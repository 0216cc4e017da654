"""The rollout engine: against transformers' generate, against static batching, and what its safety costs.

The student is that of the quickstart with random weights; engine and transformers' class hold the same values, the
engine its experts as packed FP4. No stop token ends a sample here: lengths are given. Settings: threads (all cores) and
repeats (3).

Static batching is the same engine with every sample of a batch decoded until the longest one is done. Lengths spread
1:10 are log-uniform, which is what completions look like: many short ones, few long. There are enough samples for the
end, when slots run empty, to be a small part. Since both ways read the same prompts, and a processor takes for a token
of a prompt about a third of what it takes for a sampled one, prompts that few samples share lessen the difference.
"""

from __future__ import annotations

import copy
import math
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM

from opd.__main__ import compose
from opd.config import SamplingConfig
from opd.fp4 import pack_weights
from opd.model import DeepseekV4, new_v4
from opd.weights import apply_snapshot, snapshot_of
from rollout.engine import V4Engine
from rollout.request import Request
from rollout.wal import Durability, Log, LogKey
from scripts.benchmarks import Figure, interleaved, report, split_arguments, whole_numbers

DEFAULTS = {"threads": len(os.sched_getaffinity(0)), "repeats": 3}
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 128
LONG_PROMPT, GROUP = 768, 16
MAX_TOKENS = 1024
SPREAD_SAMPLES, SPREAD = 2048, 10
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' implementations that need no further package
SEED = 0


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS)
    torch.set_num_threads(settings["threads"])
    config = compose("quickstart", [f"model.max_tokens={MAX_TOKENS}"])[0]
    student = new_v4(config.model, config.tokenizer.vocab_size, SEED)
    apply_snapshot(student, snapshot_of(student, 0, config.model.fp4))  # values that FP4 holds exactly
    packed = copy.deepcopy(student)
    pack_weights(packed, config.model.fp4)
    repeats = settings["repeats"]
    figures = [
        Figure(name="threads", value=settings["threads"], unit="count"),
        *throughput(student, packed, repeats),
        *group_cost(packed, repeats),
        *spread_lengths(packed, repeats, config.stages.grpo.group_size),
        *spread_lengths(packed, repeats, config.stages.distill.group_size),
        *log_cost(packed, repeats),
    ]
    return report(f"rollouts of the quickstart's student, {SAMPLES} slots", figures, as_json)


def engine_of(model: DeepseekV4) -> V4Engine:
    return V4Engine(model, num_slots=SAMPLES, max_tokens=MAX_TOKENS, stop_ids=(), seed=SEED)


def prompts_of(model: DeepseekV4, count: int, length: int) -> list[tuple[int, ...]]:
    rng = random.Random(SEED)
    return [tuple(rng.choices(range(model.head.shape[0]), k=length)) for _ in range(count)]


def request(index: int, prompt: tuple[int, ...], max_new_tokens: int) -> Request:
    return Request(trajectory_id=str(index), prompt_id="p", domain="d", token_ids=prompt, max_new_tokens=max_new_tokens)


def sampling(max_new_tokens: int) -> SamplingConfig:
    return SamplingConfig(temperature=1.0, max_new_tokens=max_new_tokens)


def throughput(student: DeepseekV4, packed: DeepseekV4, repeats: int) -> list[Figure]:
    """SAMPLES samples at once, one of each prompt, NEW_TOKENS tokens each."""
    prompts = prompts_of(student, SAMPLES, PROMPT_TOKENS)
    engine = engine_of(packed)
    requests = [request(index, prompt, NEW_TOKENS) for index, prompt in enumerate(prompts)]
    token_ids = torch.tensor(prompts)

    def ours() -> None:
        produced = engine.generate(requests, sampling(NEW_TOKENS), 0)
        assert all(trajectory.num_loss_tokens == NEW_TOKENS for trajectory in produced)

    def theirs(network: Any, max_new_tokens: int = NEW_TOKENS) -> None:
        produced = network.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        assert produced.shape == (SAMPLES, PROMPT_TOKENS + max_new_tokens)

    networks: dict[str, Any] = {}
    for experts in EXPERTS:
        network: Any = DeepseekV4ForCausalLM._from_config(
            copy.deepcopy(student.config), attn_implementation="eager", experts_implementation=experts
        )
        network.load_state_dict(student.state_dict())
        networks[experts] = network.eval()
    trials = interleaved({name: lambda n=network: theirs(n, 8) for name, network in networks.items()}, 1)
    fastest = min(trials, key=lambda name: trials[name][0])
    seconds = interleaved({"ours": ours, "theirs": lambda: theirs(networks[fastest])}, repeats)
    rates = {name: SAMPLES * NEW_TOKENS / median(values) for name, values in seconds.items()}
    ratio = paired(seconds["theirs"], seconds["ours"])
    return [
        Figure(name="engine", value=rates["ours"], unit="tokens/s"),
        Figure(name=f"transformers generate, {fastest} experts", value=rates["theirs"], unit="tokens/s"),
        Figure(name="engine speed-up", value=ratio, unit="x", bar=">= 6", ok=ratio >= 6),
    ]


def group_cost(packed: DeepseekV4, repeats: int) -> list[Figure]:
    """The first tokens of GROUP samples of one long prompt, in readings of that prompt."""
    engine = engine_of(packed)
    (prompt,) = prompts_of(packed, 1, LONG_PROMPT)

    def first_tokens(count: int) -> None:
        engine.generate([request(index, prompt, 1) for index in range(count)], sampling(1), 0)

    seconds = interleaved({"one": lambda: first_tokens(1), "group": lambda: first_tokens(GROUP)}, 3 * repeats)
    read = engine.prefilled_tokens / LONG_PROMPT
    ratio = paired(seconds["group"], seconds["one"])
    return [
        Figure(name=f"prompt of {LONG_PROMPT}, {GROUP} samples: tokens read", value=read, unit="prefills"),
        Figure(
            name=f"prompt of {LONG_PROMPT}, {GROUP} samples: time",
            value=ratio,
            unit="prefills",
            bar="< 1.3",
            ok=ratio < 1.3,
        ),
    ]


def spread_lengths(packed: DeepseekV4, repeats: int, group: int) -> list[Figure]:
    """SPREAD_SAMPLES samples of lengths spread 1:SPREAD, `group` of each prompt, in any slot as it comes free and batch
    by batch."""
    rng = random.Random(SEED)
    prompts = [prompt for prompt in prompts_of(packed, SPREAD_SAMPLES // group, PROMPT_TOKENS) for _ in range(group)]
    lengths = [round(NEW_TOKENS * SPREAD ** (rng.random() - 1)) for _ in prompts]
    requests = [request(i, *rest) for i, rest in enumerate(zip(prompts, lengths, strict=True))]
    engine = engine_of(packed)

    def continuous() -> None:
        produced = engine.generate(requests, sampling(NEW_TOKENS), 0)
        assert [trajectory.num_loss_tokens for trajectory in produced] == lengths

    def static() -> None:
        for begin in range(0, len(requests), SAMPLES):
            batch = requests[begin : begin + SAMPLES]
            longest = max(lengths[begin : begin + SAMPLES])
            engine.generate([replace(item, max_new_tokens=longest) for item in batch], sampling(longest), 0)

    seconds = interleaved({"continuous": continuous, "static": static}, repeats)
    ratio = paired(seconds["static"], seconds["continuous"])
    name = f"lengths 1:{SPREAD}, {group} of a prompt"
    return [
        Figure(name=f"{name}, mean", value=float(np.mean(lengths)), unit="tokens"),
        Figure(name=name, value=sum(lengths) / median(seconds["continuous"]), unit="tokens/s"),
        Figure(name=f"{name}: over static batching", value=ratio, unit="x", bar=">= 2", ok=ratio >= 2),
    ]


def log_cost(packed: DeepseekV4, repeats: int) -> list[Figure]:
    """The same batch without a log and under each policy; what a decoding step pays for it."""
    engine = engine_of(packed)
    requests = [request(i, prompt, NEW_TOKENS) for i, prompt in enumerate(prompts_of(packed, SAMPLES, PROMPT_TOKENS))]
    size = 0

    def plain() -> None:
        engine.generate(requests, sampling(NEW_TOKENS), 0)

    with tempfile.TemporaryDirectory(prefix="opd_wal_") as folder:
        key = LogKey(path=os.path.join(folder, "w.wal"), run="bench", worker="w", batch=0)

        def logged(durability: Durability) -> None:
            nonlocal size
            with Log(key, requests, sampling(NEW_TOKENS), policy_version=0, seed=SEED, durability=durability) as log:
                begin = os.path.getsize(key.path)
                engine.generate(requests, sampling(NEW_TOKENS), 0, log)
                size = os.path.getsize(key.path) - begin

        calls: dict[str, Callable[[], None]] = {
            "none": plain,
            "process": lambda: logged("process"),
            "machine": lambda: logged("machine"),
        }
        seconds = interleaved(calls, repeats)
    figures = [Figure(name="log", value=size / (SAMPLES * NEW_TOKENS), unit="bytes/token")]
    for name, values in seconds.items():
        figures.append(Figure(name=f"step, wal={name}", value=median(values) / NEW_TOKENS * 1e3, unit="ms"))
    for name in ("process", "machine"):
        cost = paired(seconds[name], seconds["none"]) - 1
        figures.append(Figure(name=f"cost of wal={name}", value=100 * cost, unit="% of a step"))
    return figures


def paired(dividends: list[float], divisors: list[float]) -> float:
    """The median ratio of measurements that were taken in turn."""
    value = median(dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True))
    assert math.isfinite(value)
    return value
