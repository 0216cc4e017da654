"""Ranks and ZeRO stages: all give what one process gives, go on from each other's checkpoints, and fail together."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import opd.shards
from opd.config import ModelConfig, StageConfig
from opd.learner import Learner
from opd.model import new_v4
from opd.stats import merge_stats
from opd.types import Demonstration, Group
from opd.weights import save_checkpoint
from tests.test_learner import (
    DENSE,
    DISTILL,
    MOE,
    SFT,
    VOCAB,
    Memory,
    make_groups,
    make_teachers,
    plan_of,
    settings_for,
)

# Two picks of an indexer that learns, and a block for multi-token prediction: what runs of a layer depends on the rows.
DEEP = {**MOE, "index_topk": 2, "compress_rates": {"compressed_sparse_attention": 2}, "num_nextn_predict_layers": 1}
Case = tuple[str, str, int]  # model, optimizer, ZeRO stage
STAGES = {"adamw": (0, 1, 2, 3), "muon": (0, 1, 2)}
CASES: list[Case] = [
    (kind, name, stage) for kind in ("dense", "moe", "deep") for name in STAGES for stage in STAGES[name]
]
FEW: list[Case] = [
    ("moe", "adamw", 1),
    ("moe", "muon", 1),
    ("dense", "adamw", 2),
    ("deep", "adamw", 3),
    ("deep", "muon", 2),
]
OTHER_MICRO_BATCHES = (16, 64, 1000)  # tokens, other than those of `take_steps`
LAYOUTS = [(name, stage) for name in STAGES for stage in STAGES[name]]
FEW_LAYOUTS = [("muon", 2), ("adamw", 2), ("adamw", 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models to start from, and what one process makes of every case and every layout's checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    LlamaForCausalLM(DENSE).save_pretrained(folder / "dense")
    for name, config in (("moe", MOE), ("deep", DEEP)):
        save_checkpoint(folder / name, new_v4(ModelConfig(config=config, fp4="none", max_tokens=128), VOCAB, 0), None)
    return folder


def start(folder: Path, kind: str, optimizer: str, zero_stage: int, group: tuple[int, int, int]) -> Learner:
    """A learner of rank `group[0]` of `group[1]` that meets the others at port `group[2]`."""
    stage: StageConfig = DISTILL
    if kind == "deep":
        stage = dataclasses.replace(SFT, indexer_loss=0.7, mtp_weight=0.3)
    family = "hf" if kind == "dense" else "deepseek_v4"
    model = ModelConfig(family=family, path=str(folder / kind), fp4="none")
    settings = settings_for(model, stage, optimizer=optimizer, zero_stage=zero_stage, grad_clip=0.05)
    rank, world_size, port = group
    return Learner(dataclasses.replace(settings, rank=rank, world_size=world_size, master_port=port), Memory())


def routed(group: Group, rng: np.random.Generator) -> Group:
    """As if a sampler had chosen any two of the four experts of the one layer that learns to route."""

    def experts(num_tokens: int) -> np.ndarray:
        chosen = rng.permuted(np.tile(np.arange(4, dtype=np.int16), (num_tokens, 1, 1)), axis=-1)[..., :2]
        chosen[-1] = -1
        return chosen

    recorded = (dataclasses.replace(t, routing=experts(len(t.token_ids))) for t in group.trajectories)
    return dataclasses.replace(group, trajectories=tuple(recorded))


def take_steps(learner: Learner, steps: range, micro_batch_tokens: int = 24) -> list[Any]:
    """Steps of different sizes; the second one is too small for all ranks to have a row. The third replays routing."""
    stats = []
    for step in steps:
        num, longest = ((5, 12), (1, 3), (4, 9), (3, 14))[step]
        groups = make_groups(num, seed=step, longest=longest)
        if step == 2 and learner.settings.model.family == "deepseek_v4":
            groups = [routed(group, np.random.default_rng(0)) for group in groups]
        signals: Any = [[Demonstration()] * 2 for _ in groups]
        heads = {}
        if learner.settings.stage is not SFT and learner.settings.stage == DISTILL:
            signals, heads = make_teachers(groups, learner._store)  # type: ignore[arg-type]
        num_ranks = learner.settings.world_size
        the_plan = plan_of(groups, signals, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
        stats.append(learner.step(the_plan, heads))
    return stats


def whole_weights(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner._engine.weights().items()}


def run_cases(folder: Path, group: tuple[int, int, int], cases: list[Case]) -> None:
    """Writes, for every case, rank 0's weights, all ranks' metrics and how much optimizer state each rank has."""
    rank, world_size, _ = group
    for kind, optimizer, zero_stage in cases:
        learner = start(folder, kind, optimizer, zero_stage, group)
        stats = take_steps(learner, range(3))
        held = sum(fragment.value.numel() for fragment in learner._engine.state())
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, (stats, held))
        weights = whole_weights(learner)
        learner.close()
        if rank == 0:
            name = folder / f"{kind}_{optimizer}_{zero_stage}_of_{world_size}"
            save_file(weights, f"{name}.safetensors")
            metrics = [merge_stats(list(step)) for step in zip(*(stats for stats, _ in everyone), strict=True)]
            name.with_suffix(".json").write_text(json.dumps({"metrics": metrics, "held": [h for _, h in everyone]}))


def measure_rounding(folder: Path, kind: str, optimizer: str) -> None:
    """Writes, by name, how far weights are apart after four steps of one process that add up in another order."""
    weights = {}
    for tokens in (24, *OTHER_MICRO_BATCHES):
        learner = start(folder, kind, optimizer, 0, (0, 1, 0))
        take_steps(learner, range(4), tokens)
        weights[tokens] = whole_weights(learner)
        learner.close()
    apart = {
        name: max((weights[tokens][name] - weight).abs().max().item() for tokens in OTHER_MICRO_BATCHES)
        for name, weight in weights[24].items()
    }
    (folder / f"{kind}_{optimizer}_rounding.json").write_text(json.dumps(apart))


def save_layouts(folder: Path, group: tuple[int, int, int], layouts: list[tuple[str, int]]) -> None:
    """Saves after two steps, takes two more in the saving learner, and again in a new one that loads: bitwise equal."""
    for optimizer, zero_stage in layouts:
        learner = start(folder, "moe", optimizer, zero_stage, group)
        take_steps(learner, range(2))
        checkpoint = folder / f"checkpoint_{optimizer}_{zero_stage}_of_{group[1]}"
        learner.save(checkpoint)
        expected = take_steps(learner, range(2, 4))  # while the files are written
        learner.finish_saving()
        weights = whole_weights(learner)
        if group[1] > 1:
            dist.barrier()
        resumed = start(folder, "moe", optimizer, zero_stage, group)
        resumed.load(checkpoint)
        for one, two in zip(expected, take_steps(resumed, range(2, 4)), strict=True):
            assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(two, seconds=0.0)
        again = whole_weights(resumed)
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights), (optimizer, zero_stage)
        if group[0] == 0:
            save_file(weights, f"{checkpoint}.safetensors")
        learner.close()
        resumed.close()


def load_layouts(folder: Path, group: tuple[int, int, int], layouts: list[tuple[str, int]], saved_by: int) -> None:
    """Every checkpoint of `saved_by` ranks, taken up by this group at the next stage of the same optimizer."""
    for optimizer, zero_stage in layouts:
        other = (zero_stage + 1) % len(STAGES[optimizer])
        learner = start(folder, "moe", optimizer, other, group)
        learner.load(folder / f"checkpoint_{optimizer}_{zero_stage}_of_{saved_by}")
        take_steps(learner, range(2, 4))
        weights = whole_weights(learner)
        learner.close()
        if group[0] == 0:
            expected = load_file(folder / f"checkpoint_{optimizer}_{zero_stage}_of_{saved_by}.safetensors")
            assert_same_path(folder, ("moe", optimizer), expected, weights)


def fail_together(folder: Path, group: tuple[int, int, int]) -> None:
    """The last rank is given other heads; every rank raises that, at once."""
    learner = start(folder, "moe", "adamw", 2, group)
    groups = make_groups(4)
    signals, heads = make_teachers(groups, learner._store)  # type: ignore[arg-type]
    rank, world_size, _ = group
    if rank == world_size - 1:
        heads = {name: dataclasses.replace(head, content_hash="0" * 64) for name, head in heads.items()}
    the_plan = plan_of(groups, signals, num_ranks=world_size, micro_batch_tokens=24)
    started = time.monotonic()
    wanted = "" if rank == world_size - 1 else f"^learner rank {world_size - 1}: "
    with pytest.raises(ValueError, match=f"{wanted}.*the head at hand is 000"):
        learner.step(the_plan, heads)
    assert time.monotonic() - started < 60
    assert not dist.is_initialized()
    (folder / f"failed_{rank}").touch()
    while len(list(folder.glob("failed_*"))) < world_size and time.monotonic() - started < 60:
        time.sleep(0.05)  # the others may not have read the cause yet from the store that ends with rank 0


def one_rank(
    rank: int, world_size: int, port: int, folder: Path, cases: list[Case], layouts: list[tuple[str, int]]
) -> None:
    torch.set_num_threads(1)
    opd.shards.SMALLEST_CUT = 256  # so that embeddings as small as these are cut too
    group = (rank, world_size, port)
    run_cases(folder, group, cases)
    save_layouts(folder, group, layouts)
    load_layouts(folder, group, layouts, saved_by=1)
    fail_together(folder, group)


def spawn(world_size: int, *args: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_rank, args=(rank, world_size, port, *args)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=900)
        process.kill()  # no effect on one that has ended
    assert [process.exitcode for process in ranks] == [0] * world_size


def assert_same_path(
    folder: Path, case: tuple[str, str], weights: dict[str, Tensor], others: dict[str, Tensor]
) -> None:
    """Weights after a few steps of 1e-3 are about as far apart as rounding puts them: Newton-Schulz, and AdamW where a
    gradient is nearly nothing, make rounding errors larger, and of some parameters (the maps of a hyper-connection)
    more than of others. So what other orders of summation do in one process is the measure, for parameters of one kind
    together: a kind of three numbers a layer would be measured by too few of them otherwise."""
    rounding = json.loads((folder / f"{case[0]}_{case[1]}_rounding.json").read_text())
    assert weights.keys() == others.keys() == rounding.keys()
    of_kind: dict[str, float] = {}
    for name, apart in rounding.items():
        of_kind[kind_of(name)] = max(apart, of_kind.get(kind_of(name), 0.0))
    for name, weight in weights.items():
        assert (others[name] - weight).abs().max().item() < 4 * of_kind[kind_of(name)] + 1e-6, (*case, name)


def kind_of(name: str) -> str:
    """The name without its layer's number and without which half of the layer a hyper-connection is for."""
    return re.sub(r"(attn|ffn)_hc", "hc", re.sub(r"\.\d+\.", ".", name))


def check_ranks(folder: Path, world_size: int, cases: list[Case], layouts: list[tuple[str, int]]) -> None:
    alone = (0, 1, 0)
    for kind, optimizer in sorted({("moe", name) for name, _ in layouts} | {case[:2] for case in cases}):
        measure_rounding(folder, kind, optimizer)
    save_layouts(folder, alone, layouts)
    spawn(world_size, folder, cases, layouts)
    load_layouts(folder, alone, layouts, saved_by=world_size)
    run_cases(folder, alone, sorted({(kind, optimizer, 0) for kind, optimizer, _ in cases}))
    for kind, optimizer, zero_stage in cases:
        name, one_process = f"{kind}_{optimizer}_{zero_stage}_of_{world_size}", f"{kind}_{optimizer}_0_of_1"
        expected = json.loads((folder / f"{one_process}.json").read_text())
        found = json.loads((folder / f"{name}.json").read_text())
        for one, two in zip(expected["metrics"], found["metrics"], strict=True):
            assert one.keys() == two.keys()
            # Of the rank that loads most: among more ranks, each has fewer teachers.
            assert two.pop("distill/head_loads", 0) <= one.pop("distill/head_loads", 0), name
            for key, value in one.items():
                assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        whole, divided = (load_file(folder / f"{run}.safetensors") for run in (one_process, name))
        assert_same_path(folder, (kind, optimizer), whole, divided)
        (held,) = expected["held"]
        assert sum(found["held"]) == held, name  # each number once
        if zero_stage > 0:
            assert max(found["held"]) < 1.25 * held / world_size, name


def test_two_ranks_do_what_one_does(folder: Path) -> None:
    check_ranks(folder, 2, FEW, FEW_LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_ranks_and_stages_do_what_one_process_does(folder: Path, world_size: int) -> None:
    for written in folder.glob("*_of_*"):  # by another test
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    check_ranks(folder, world_size, CASES, LAYOUTS)
