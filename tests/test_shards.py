"""Muon's optimizer divided by whole matrices: every number once, nothing cut in two, work and memory in balance."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opd.config import ModelConfig, OptimizerConfig
from opd.model import new_v4
from opd.muon import MuonAdamW, build_optimizer
from opd.shards import Piece, Shards, partition
from tests.test_learner import MOE, VOCAB

V4: dict[str, Any] = {**MOE, "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"]}
V4["layer_types"] = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return new_v4(ModelConfig(config=V4, fp4="none", max_tokens=128), VOCAB, 0)


def optimizer_of(model: nn.Module) -> MuonAdamW:
    optimizer = build_optimizer(model, OptimizerConfig(), 0.01)
    assert isinstance(optimizer, MuonAdamW)
    return optimizer


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
def test_pieces_are_whole_matrices_and_every_number_once(model: nn.Module, num_ranks: int) -> None:
    groups = optimizer_of(model).param_groups
    pieces = partition(groups, num_ranks)
    assert pieces == partition(groups, num_ranks)
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            own = [piece for piece in pieces if (piece.group, piece.index) == (index, place)]
            ends = [0, *(piece.end for piece in own)]
            assert [piece.start for piece in own] == ends[:-1] and ends[-1] == parameter.numel()
            assert len(own) <= num_ranks
            if group["algorithm"] == "adamw":
                continue
            columns = parameter.shape[-1]
            sizes = list(group["blocks"][place]) * math.prod(parameter.shape[:-2])  # rows of its matrices, in order
            borders = {columns * rows for rows in itertools.accumulate(sizes)}
            assert all(piece.end in borders for piece in own)
            for piece in own:
                assert sum(piece.blocks) == piece.shape[-2] and piece.shape[-1] == columns
    assert {piece.owner for piece in pieces} <= set(range(num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_state_and_work_are_in_balance(model: nn.Module, num_ranks: int) -> None:
    groups = optimizer_of(model).param_groups
    pieces = partition(groups, num_ranks)

    def share(of: Any, among: list[Piece]) -> float:
        loads = [sum(of(piece) for piece in among if piece.owner == rank) for rank in range(num_ranks)]
        return max(loads) / (sum(loads) / num_ranks)

    def products(piece: Piece) -> int:
        total = 0
        for rows in piece.blocks:
            short, long = min(rows, piece.shape[-1]), max(rows, piece.shape[-1])
            total += 2 * short**2 * long + short**3
        return total * math.prod(piece.shape[:-2])

    assert share(products, [piece for piece in pieces if piece.blocks]) < 1.1
    state = {"muon": 1, "adamw": 2}
    # An embedding this small stays in one piece, which is a tenth of an eighth of the state.
    assert share(lambda piece: piece.numel * state[groups[piece.group]["algorithm"]], pieces) < 1.25


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_ranks_together_take_the_step_of_one(model: nn.Module, num_ranks: int) -> None:
    """Without messages: each rank's shards over a copy of the model, put together by owner after every step."""
    whole = copy.deepcopy(model)
    optimizer = optimizer_of(whole)
    copies = [copy.deepcopy(model) for _ in range(num_ranks)]
    shards = [
        Shards(one, optimizer_of(one), rank, num_ranks, divides_gradients=False) for rank, one in enumerate(copies)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameters in zip(whole.parameters(), *(one.parameters() for one in copies), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        optimizer.step()
        for shard in shards:
            shard.attach()
            shard.optimizer.step()
            shard.drop_gradients()
        for piece in shards[0].pieces:
            owned = shards[piece.owner].parameter(piece).data.view(-1)[piece.start : piece.end]
            for shard in shards:
                shard.parameter(piece).data.view(-1)[piece.start : piece.end] = owned
    for (name, one), two in zip(whole.named_parameters(), copies[-1].parameters(), strict=True):
        assert (one - two).abs().max() < 2e-6, name
    held = [numbers_of_state(shard.optimizer) for shard in shards]
    assert sum(held) == numbers_of_state(optimizer)
    assert max(held) < 1.2 * sum(held) / num_ranks


def numbers_of_state(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(value.numel() for value in values if isinstance(value, Tensor))
