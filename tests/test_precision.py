"""Precisions of teachers: FP8 against a slow oracle, and every one against a model that has the rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.config import ConfigError, ModelConfig
from opd.fp4 import dequantize, is_fp4_name, quantize
from opd.model import load_model
from opd.stored import stored_shapes
from opd.weights import named_weights, save_checkpoint
from teachers.precision import (
    TILE,
    Fp8Weight,
    dequantize_fp8,
    entry_bytes,
    held_bytes,
    quantize_fp8,
    take_weights,
)
from tests.test_teachers import VOCAB, v4

IDS = torch.arange(60).view(3, 20) * 4 % VOCAB
LENGTHS = torch.tensor([20, 11, 3])


def e4m3(value: float) -> float:
    """The nearest number with 3 bits of mantissa and exponents from -6, ties to even, by search."""
    grid = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    grid = [number for number in grid if number <= 448]
    best = min(range(len(grid)), key=lambda i: (abs(grid[i] - abs(value)), i % 2))
    return grid[best] if value >= 0 else -grid[best]


@pytest.mark.parametrize("shape", [(3, 5), (130, 7), (2, 129, 140)])
def test_fp8_is_the_slow_oracles(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    weight[..., 0, 0] = 0.0
    codes, scales = quantize_fp8(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    found = dequantize_fp8(codes, scales)
    for matrix in range(weight[..., 0, 0].numel()):
        values, rounded = (x.reshape(-1, *shape[-2:])[matrix] for x in (weight, found))
        for top in range(0, shape[-2], TILE):
            for left in range(0, shape[-1], TILE):
                tile = values[top : top + TILE, left : left + TILE]
                largest, exponent = tile.abs().max().item(), -140
                while largest > 448 * 2.0**exponent:
                    exponent += 1
                some = [(0, 0), (tile.shape[0] - 1, tile.shape[1] - 1), divmod(int(tile.abs().argmax()), tile.shape[1])]
                for row, column in [*some, *((i % tile.shape[0], i % tile.shape[1]) for i in range(0, 40, 3))]:
                    expected = e4m3(tile[row, column].item() / 2.0**exponent) * 2.0**exponent
                    assert rounded[top + row, left + column].item() == expected
    again = dequantize_fp8(*quantize_fp8(found))
    assert torch.equal(again, found)  # rounding twice is rounding once
    with pytest.raises(ValueError, match="not finite"):
        quantize_fp8(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="two dimensions"):
        quantize_fp8(torch.ones(3))


def test_fp8_of_nothing_and_of_extremes() -> None:
    for value in (0.0, 1e-38, 3e38):
        weight = torch.full((2, 3), value)
        codes, scales = quantize_fp8(weight)
        assert dequantize_fp8(codes, scales).sub(weight).abs().max() <= 0.07 * value and scales.isfinite().all()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "v4", v4(0), None)
    for name, tied in (("qwen", False), ("tied", True)):
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, attention_bias=True, tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(1)
        Qwen3ForCausalLM(config).save_pretrained(root / name)
    return {name: str(root / name) for name in ("v4", "qwen", "tied")}


def loaded(path: str, family: str) -> Any:
    return load_model(ModelConfig(family=family, path=path, fp4="none"))


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(IDS, LENGTHS).hidden
    return torch.cat([hidden[row, :length] for row, length in enumerate(LENGTHS)]).float()


def rounded(name: str, weight: torch.Tensor, family: str, precision: str | None) -> torch.Tensor:
    is_matrix = ".layers." in name and weight.dim() > 1 and name.endswith(("weight", "_proj"))
    match precision:
        case "bf16":
            return weight.bfloat16().float()
        case "fp8" if is_matrix and not name.endswith((".gate.weight", "norm.weight")):
            return dequantize_fp8(*quantize_fp8(weight))
        case "fp4" if is_fp4_name(name, tuple(weight.shape), "experts" if family == "deepseek_v4" else "linears"):
            return dequantize(quantize(weight))
        case None if family == "deepseek_v4" and is_fp4_name(name, tuple(weight.shape), "experts"):
            return dequantize(quantize(weight))
        case _:
            return weight


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp8", "fp4"])
@pytest.mark.parametrize("name", ["v4", "qwen", "tied"])
def test_a_shell_computes_what_a_model_with_rounded_weights_does(
    name: str, precision: str | None, models: dict[str, str]
) -> None:
    family = "deepseek_v4" if name == "v4" else "hf"
    plain, model = loaded(models[name], family), loaded(models[name], family)
    for key, weight in named_weights(plain).items():
        if weight.dtype == torch.float32 and not key.endswith("e_score_correction_bias"):
            weight.copy_(rounded(key, weight, family, precision))
    if precision == "bf16":
        plain = plain.bfloat16()
    fresh = {key: weight.clone() for key, weight in named_weights(loaded(models[name], family)).items()}
    shell, entries = take_weights(model, family, precision, "experts" if family == "deepseek_v4" else "none")
    assert entry_bytes(entries) <= held_bytes(stored_shapes(models[name]), family, precision)
    assert entries.keys() == fresh.keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == 0  # nothing stays behind
    expected = states(plain)
    tolerance = 0.05 if precision == "bf16" else 2e-5
    for attempt in range(2):
        shell.install(entries)
        found = states(shell.model)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.equal(shell.model.head.float(), plain.head.float())
        shell.clear()
        with pytest.raises(Exception):  # noqa: B017, PT011 (whatever torch makes of it: there are no weights)
            states(shell.model)
        if attempt == 0:  # from the plain tensors, as they are read a second time
            entries = {key: shell.held(key, weight) for key, weight in fresh.items()}
    packed = [entry for entry in entries.values() if isinstance(entry, nn.Module)]
    assert bool(packed) == (precision in ("fp8", "fp4"))
    if precision == "fp8":
        assert all(isinstance(entry, Fp8Weight) for entry in packed)


def test_bytes_fall_with_the_precision(models: dict[str, str]) -> None:
    for name, family in (("v4", "deepseek_v4"), ("qwen", "hf")):
        sizes = {}
        for precision in ("fp32", "bf16", "fp8", "fp4"):
            _, entries = take_weights(loaded(models[name], family), family, precision, "none")
            sizes[precision] = entry_bytes(entries)
        assert sizes["bf16"] < 0.52 * sizes["fp32"]
        assert max(sizes["fp8"], sizes["fp4"]) < sizes["fp32"]


def test_what_cannot_be_packed_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    narrow = Qwen3Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"precision=fp4: .* multiple of 32"):
        take_weights(loaded(str(tmp_path / "narrow"), "hf"), "hf", "fp4", "none")
    broken = loaded(models["v4"], "deepseek_v4")
    named_weights(broken)["model.layers.0.mlp.experts.down_proj"][0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts\.down_proj: .*not finite"):
        take_weights(broken, "deepseek_v4", "fp8", "none")
