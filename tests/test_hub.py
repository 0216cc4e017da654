"""Hugging Face models under the loop's contract, and those refused because hidden states cannot say it all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd.config import ConfigError
from opd.engine import loading_divided
from opd.fp4 import dequantize, fake_quantize, pack_weights, packed_weights, quantize
from opd.group import join
from opd.model.hub import load_hub_model
from opd.weights import apply_snapshot, load_snapshot, named_weights, save_checkpoint, save_snapshot, snapshot_of

SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match kind:
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False))
        case "llama_tied":
            return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
        case _:
            return GemmaForCausalLM(GemmaConfig(**SHAPE))  # scales its embeddings, ties its head


KINDS = pytest.mark.parametrize("kind", ["qwen3", "llama_tied", "gemma"])


@KINDS
def test_head_times_hidden_is_the_model_on_ragged_rows(kind: str, tmp_path: Path) -> None:
    original = tiny(kind).eval()
    original.save_pretrained(tmp_path)
    model = load_hub_model(str(tmp_path))
    lengths = [9, 3, 6]
    token_ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    output = model(token_ids, torch.tensor(lengths))
    assert output.hidden.shape == (3, 9, 32) and output.hidden.dtype == torch.float32
    assert output.expert_load.shape == (0, 0) and output.balance_loss.shape == () and output.balance_loss.item() == 0
    assert model.head.shape == (50, 32) and not model.training
    for row, length in enumerate(lengths):
        logits = original(input_ids=token_ids[row : row + 1, :length]).logits[0]
        assert torch.allclose(output.hidden[row, :length] @ model.head.T, logits, atol=1e-5)
    changed = token_ids.clone()
    changed[1, 3:] = 7  # what stands in the padding reaches nobody
    assert torch.equal(model(changed, torch.tensor(lengths)).hidden[1, :3], output.hidden[1, :3])


@KINDS
def test_names_and_files_are_the_published_models(kind: str, tmp_path: Path) -> None:
    original = tiny(kind)
    original.save_pretrained(tmp_path / "a")
    model = load_hub_model(str(tmp_path / "a"))
    assert dict(model.named_parameters()).keys() == dict(original.named_parameters()).keys()
    assert model.state_dict().keys() == original.state_dict().keys()
    assert model.head is dict(model.named_parameters(remove_duplicate=False))["lm_head.weight"]

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_checkpoint(tmp_path / "b", model, None)
    assert (
        load_file(tmp_path / "b" / "model.safetensors").keys() == load_file(tmp_path / "a" / "model.safetensors").keys()
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    opened, loading = loaded
    assert not any(loading.values())
    assert all(torch.equal(opened.state_dict()[name], value) for name, value in model.state_dict().items())

    save_snapshot(tmp_path / "snapshot", snapshot_of(model, 1, "none"))
    other = load_hub_model(str(tmp_path / "a"))
    apply_snapshot(other, load_snapshot(tmp_path / "snapshot"))
    token_ids, lengths = torch.arange(5)[None], torch.tensor([5])
    assert torch.equal(other(token_ids, lengths).hidden, model(token_ids, lengths).hidden)


def test_every_parameter_gets_its_gradient_through_head_and_hidden(tmp_path: Path) -> None:
    original = tiny("qwen3")
    original.save_pretrained(tmp_path)
    model = copy.deepcopy(load_hub_model(str(tmp_path)))  # a copy must stand on its own
    token_ids = torch.arange(6)[None]
    (model(token_ids, torch.tensor([6])).hidden @ model.head.T).logsumexp(-1).sum().backward()
    original(input_ids=token_ids).logits.logsumexp(-1).sum().backward()
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        found = dict(model.named_parameters())[name].grad
        assert found is not None and torch.allclose(found, parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("planted", ["soft_cap", "logit_scale", "head_bias"])
def test_models_whose_logits_are_not_head_times_hidden_are_refused(planted: str, tmp_path: Path) -> None:
    match planted:
        case "soft_cap":  # logits of a fresh tiny model are far below the cap: only the blown-up probe can see it
            model: PreTrainedModel = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=30.0))
            message = r"Gemma2ForCausalLM.*'final_logit_softcapping': 30.0"
        case "logit_scale":
            model = CohereForCausalLM(
                CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logit_scale=0.5)
            )
            message = r"CohereForCausalLM.*'logit_scale': 0.5"
        case _:
            model = PhiForCausalLM(PhiConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}))
            torch.nn.init.ones_(model.lm_head.bias)
            message = "PhiForCausalLM"
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_hub_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_what_does_not_load_is_refused_by_path(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            load_hub_model(str(tmp_path / "m"))
        assert str(tmp_path / "m") in str(caught.value)

    refused("does not exist; expected a checkpoint folder")
    tiny("qwen3").save_pretrained(tmp_path / "m")
    weights, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    complete = load_file(weights)
    save_file(
        {name: value for name, value in complete.items() if "layers.1.mlp" not in name}, weights, {"format": "pt"}
    )
    refused("lacks 3 of its model's tensors, first 'model.layers.1.mlp.down_proj.weight'")
    save_file({**complete, "lm_head.weight": torch.ones(2, 2)}, weights, {"format": "pt"})
    refused("does not load as a causal language model")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("does not load as a causal language model")
    save_file(complete, weights, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    refused("quantised weights")


def test_loads_as_fp32_masters_whatever_the_file_holds(tmp_path: Path) -> None:
    tiny("qwen3").bfloat16().save_pretrained(tmp_path)
    model = load_hub_model(str(tmp_path))
    assert {tensor.dtype for tensor in named_weights(model).values()} == {torch.float32}
    model.update_selection_bias(torch.zeros(0, 0, dtype=torch.int64), 1e-3)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@KINDS
def test_linears_are_trained_and_sampled_as_the_same_fp4_values(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    match kind:
        case "qwen3":
            original: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False))
        case "llama_tied":
            original = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
        case _:
            original = GemmaForCausalLM(GemmaConfig(**shape))
    original.save_pretrained(tmp_path / "masters")
    with torch.no_grad():
        for name, weight in original.named_parameters():
            if name.split(".")[-2] in LINEARS:
                weight.copy_(dequantize(quantize(weight)))
    original.save_pretrained(tmp_path / "rounded")

    learner = load_hub_model(str(tmp_path / "masters"), fp4="linears")
    rounded = load_hub_model(str(tmp_path / "rounded"))
    worker = load_hub_model(str(tmp_path / "rounded"))
    masters = named_weights(load_hub_model(str(tmp_path / "masters")))
    assert named_weights(learner).keys() == masters.keys()
    assert all(torch.equal(weight, masters[name]) for name, weight in named_weights(learner).items())

    pack_weights(worker, "linears")
    assert {name.split(".")[-2] for name in packed_weights(worker)} == set(LINEARS)
    assert named_weights(worker).keys() == masters.keys() - packed_weights(worker).keys()
    snapshot = snapshot_of(learner, 3, "linears")
    apply_snapshot(worker, snapshot)
    for name, weight in packed_weights(worker).items():
        assert torch.equal(dequantize(weight.packed()), fake_quantize(masters[name]))

    token_ids, lengths = torch.randint(0, 50, (3, 9)), torch.tensor([9, 3, 6])
    with torch.no_grad():
        expected = learner(token_ids, lengths).hidden[0]
        assert torch.equal(rounded(token_ids, lengths).hidden[0], expected)
        assert torch.allclose(worker(token_ids, lengths).hidden[0], expected, atol=1e-5)
    learner(token_ids, lengths).hidden[0].square().sum().backward()
    for name in packed_weights(worker):
        assert dict(learner.named_parameters())[name].grad is not None


def test_linears_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"down_proj.weight has shape \(32, 48\); with model.fp4=linears.*fp4=none"):
        load_hub_model(str(tmp_path), fp4="linears")


def test_a_model_is_divided_as_it_is_read_and_still_examined(tmp_path: Path) -> None:
    join(0, 1, "gloo", "", 0)
    for kind in ("qwen3", "llama_tied", "gemma"):
        tiny(kind).save_pretrained(tmp_path / kind)
        with loading_divided("cpu"):
            divided: Any = load_hub_model(str(tmp_path / kind))
        whole = load_hub_model(str(tmp_path / kind))
        for one, two in zip(divided.parameters(), whole.parameters(), strict=True):
            assert one.numel() == 0 and one.ds_shape == two.shape  # nothing of it is here but its share
            assert torch.equal(one.ds_tensor.view(-1)[: two.numel()], two.view(-1))  # of one rank, which is all
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**SHAPE)).save_pretrained(tmp_path / "capped")
    with loading_divided("cpu"), pytest.raises(ConfigError, match="final_logit_softcapping"):
        load_hub_model(str(tmp_path / "capped"))
