from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV4Config, LlamaConfig, Qwen2Config

from opd.config import OptimizerConfig
from opd.model.hub import HubModel
from opd.model.transformer import DeepseekV4
from opd.muon import MuonAdamW, assign, build_optimizer, newton_schulz, split_of
from tests.oracles import hybrid_newton_schulz, muon_steps, polar_factor


def with_condition(rows: int, columns: int, condition: float) -> torch.Tensor:
    """A random matrix whose singular values run from 1 down to 1 / condition, evenly in their logarithm."""
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    rank = min(rows, columns)
    return ((u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), rank)) @ vh).float()


@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 40)])
def test_newton_schulz_gives_the_orthogonal_factor(shape: tuple[int, int], condition: float) -> None:
    matrix = with_condition(*shape, condition)
    factor = newton_schulz(matrix[None])[0]
    values = torch.linalg.svdvals(factor)
    assert values.min() >= 0.999
    assert values.max() <= 1.003
    expected = polar_factor(matrix)
    assert (factor - expected).norm() / expected.norm() < 1e-3
    assert (factor - hybrid_newton_schulz(matrix)).abs().max() < 2e-4
    rms = (factor * 0.18 * max(shape) ** 0.5).square().mean().sqrt()
    assert abs(rms / 0.18 - 1) < 1e-3


def test_newton_schulz_is_invariant_to_scale_transposition_and_company() -> None:
    matrices = torch.randn(40, 24, 64)
    factors = newton_schulz(matrices)
    for scale in (2.0**-90, 2.0**-20, 2.0**60):
        assert torch.equal(newton_schulz(matrices * scale), factors)
    assert torch.equal(newton_schulz(matrices.mT), factors.mT)
    alone = torch.cat([newton_schulz(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(alone, factors, rtol=0, atol=1e-5)
    matrices[3] = 0
    assert torch.equal(newton_schulz(matrices)[3], torch.zeros(24, 64))


def test_steep_iterations_in_bfloat16_still_end_orthogonal() -> None:
    values = torch.linalg.svdvals(newton_schulz(torch.randn(4, 64, 128), torch.bfloat16))
    assert values.min() > 0.999
    assert values.max() < 1.001


class Plain(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], config: Any = None) -> None:
        super().__init__()
        self.config = config
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def test_steps_follow_the_algorithm_matrix_by_matrix() -> None:
    model = Plain({"wide": (12, 20), "tall": (20, 12), "gate_up_proj": (3, 24, 20)})
    optimizer = build_optimizer(model, OptimizerConfig(), 0.02)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [{name: torch.randn_like(p) for name, p in start.items()} for _ in range(4)]
    for step in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name]
        optimizer.step()
    cuts = [("wide", ...), ("tall", ...), *(("gate_up_proj", (e, rows)) for e in range(3) for rows in HALVES)]
    for name, cut in cuts:
        expected = muon_steps(start[name][cut], [step[name][cut] for step in gradients], 0.02)
        torch.testing.assert_close(model.get_parameter(name)[cut].double(), expected, rtol=0, atol=2e-5)


HALVES = (slice(0, 12), slice(12, 24))


def test_summed_and_averaged_momentum_give_the_same_update() -> None:
    # M and (1 - mu) M differ by a positive factor, and so do the Nesterov terms if the gradient is scaled alike.
    gradients = [torch.randn(16, 24) for _ in range(5)]
    total, mean = torch.zeros(16, 24), torch.zeros(16, 24)
    for gradient in gradients:
        total = 0.95 * total + gradient
        mean = 0.95 * mean + 0.05 * gradient
    summed = newton_schulz((0.95 * total + gradients[-1])[None])
    averaged = newton_schulz((0.95 * mean + 0.05 * gradients[-1])[None])
    torch.testing.assert_close(summed, averaged, rtol=0, atol=1e-4)


def test_adamw_parameters_follow_torch() -> None:
    model = Plain({"bias": (7,), "position_bias": (4, 6)})
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(model, OptimizerConfig(), 0.01)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0)
    assert isinstance(optimizer, MuonAdamW)
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_restored_optimizer_takes_the_bitwise_same_step(name: str) -> None:
    model = Plain({"weight": (12, 20), "bias": (9,), "gate_up_proj": (2, 8, 20)})
    optimizer = build_optimizer(model, OptimizerConfig(name=name), 0.02)

    def step(m: nn.Module, o: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in m.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        o.step()

    for seed in range(3):
        step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = build_optimizer(twin, OptimizerConfig(name=name), 0.02)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(twin, restored, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def tiny_v4() -> DeepseekV4:
    config = DeepseekV4Config(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        o_groups=2,
        o_lora_rank=8,
        q_lora_rank=24,
        index_n_heads=4,
        index_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        partial_rotary_factor=0.5,
        num_nextn_predict_layers=0,
    )
    return DeepseekV4(config)


def test_v4_parameters_are_assigned_as_the_report_says() -> None:
    model = tiny_v4()
    parts = assign(model)
    assert names_of(model, parts.decayed) == {"model.embed_tokens.weight", "lm_head.weight"}
    plain = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in names_of(model, parts.undecayed)}
    assert plain == {
        *("q_a_norm.weight", "kv_norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"),
        *("norm.weight", "self_attn.sinks", "compressor.position_bias", "indexer.position_bias"),
        *("attn_hc.base", "attn_hc.scale", "ffn_hc.base", "ffn_hc.scale", "hc_head.hc_base", "hc_head.hc_scale"),
    }
    blocks = dict(zip(muon_names(model), parts.blocks, strict=True))
    assert len(blocks) + len(parts.decayed) + len(parts.undecayed) == len(list(model.named_parameters()))
    split = {name: sizes for name, sizes in blocks.items() if len(sizes) > 1}
    layer = "model.layers."
    expected = {f"{layer}{i}.self_attn.o_a_proj.weight": (8, 8) for i in range(3)}
    expected |= {f"{layer}{i}.mlp.experts.gate_up_proj": (32, 32) for i in range(3)}
    expected |= {f"{layer}{i}.{site}_hc.fn": (4, 4, 16) for i in range(3) for site in ("attn", "ffn")}
    for leaf in ("kv_proj", "gate_proj"):  # layer 2 compresses without overlap: one series, one matrix
        expected[f"{layer}1.self_attn.compressor.{leaf}.weight"] = (16, 16)
        expected[f"{layer}1.self_attn.compressor.indexer.{leaf}.weight"] = (8, 8)
    assert split == expected


def muon_names(model: nn.Module) -> list[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in assign(model).muon]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_dense_hub_models_are_assigned_by_role(family: Any, tied: bool) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = HubModel(AutoModelForCausalLM.from_config(family(**sizes, **heads, tie_word_embeddings=tied)))
    parts = assign(model)
    names = {name.split(".")[-2] for name in names_of(model, parts.muon)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(len(blocks) == 1 for blocks in parts.blocks)
    assert names_of(model, parts.decayed) == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert all(parameter.ndim == 1 for parameter in parts.undecayed)


def test_frozen_parameters_and_missing_gradients_are_left_alone() -> None:
    model = Plain({"frozen": (8, 8), "idle": (8, 8), "zero": (8, 8)})
    model.get_parameter("frozen").requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0), 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.get_parameter("zero").grad = torch.zeros(8, 8)
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_fused_rows_that_do_not_divide_are_refused() -> None:
    config = DeepseekV4Config(head_dim=16, hidden_size=32)
    with pytest.raises(ValueError, match=r"compressor\.kv_proj\.weight has 24 rows"):
        split_of("model.layers.0.self_attn.compressor.kv_proj.weight", (24, 32), config)


def test_masters_must_be_float32() -> None:
    parameter = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="float32"):
        MuonAdamW([{"algorithm": "adamw", "params": [parameter], "lr": 1.0}])
    with pytest.raises(ValueError, match="algorithm='sgd'"):
        MuonAdamW([{"algorithm": "sgd", "params": [parameter], "lr": 1.0}])
