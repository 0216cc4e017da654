"""BF16 products over FP32 masters, and layers that are computed twice: what stays the same, and what is saved."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from opd.compute import multiply_in_bfloat16, recompute_layers
from opd.config import ModelConfig
from opd.fp4 import quantize
from opd.learner import Learner
from opd.model import load_model, new_v4
from opd.model.hub import load_hub_model
from opd.types import Demonstration, Fp4Tensor
from opd.weights import save_checkpoint
from tests.test_learner import DENSE, MOE, SFT, VOCAB, Memory, make_groups, plan_of, settings_for, weights_of

DEEP = {**MOE, "index_topk": 2, "compress_rates": {"compressed_sparse_attention": 2}, "num_nextn_predict_layers": 1}
IDS, LENGTHS = torch.arange(28).view(2, 14), torch.tensor([14, 9])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(DENSE).save_pretrained(folder / "dense")
    deep = ModelConfig(config=DEEP, fp4="experts", max_tokens=128)
    save_checkpoint(folder / "deep", new_v4(deep, VOCAB, 0), None)
    return {
        "dense": ModelConfig(family="hf", path=str(folder / "dense"), fp4="none"),
        "deep": dataclasses.replace(deep, path=str(folder / "deep")),
    }


def forward(model: nn.Module) -> Tensor:
    """A scalar that depends on everything a forward gives."""
    deep = hasattr(model, "mtp")
    output = model(IDS, LENGTHS, **({"indexing": "sparse", "mtp": True} if deep else {}))
    total = output.hidden[0].float().square().sum() + output.balance_loss
    return total + output.index_loss + output.mtp_hidden.float().sum() if deep else total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["dense", "deep"])
def test_layers_computed_twice_give_the_same_bits_and_keep_less(models: dict[str, ModelConfig], kind: str) -> None:
    kept: list[int] = []

    def measured(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        sizes: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward(model)
        kept.append(sum(sizes.values()))
        return loss, gradients(model, loss)

    loss, expected = measured(load_model(models[kind], mtp=True))
    twice = load_model(models[kind], mtp=True)
    recompute_layers(twice)
    again, found = measured(twice)
    assert torch.equal(loss, again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert kept[1] < 0.6 * kept[0]
    with torch.no_grad():
        assert torch.equal(forward(copy.deepcopy(twice)), loss)  # copies compute the same, with their own weights


def test_an_hf_model_computes_what_its_bfloat16_copy_does(models: dict[str, ModelConfig]) -> None:
    path = models["dense"].path or ""
    model = load_hub_model(path)
    multiply_in_bfloat16(model)
    narrow = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    expected = narrow.model(input_ids=IDS[:1]).last_hidden_state
    output = model(IDS[:1], LENGTHS[:1]).hidden
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    named = dict(narrow.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            expected_gradient = named[name].grad
            assert expected_gradient is not None and torch.equal(parameter.grad.bfloat16(), expected_gradient)


def test_a_narrow_v4_is_close_and_rounds_its_experts_from_the_masters(models: dict[str, ModelConfig]) -> None:
    wide, narrow = load_model(models["deep"], mtp=True), load_model(models["deep"], mtp=True)
    multiply_in_bfloat16(narrow)
    seen: list[Any] = []

    for module in narrow.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    one, two = forward(wide), forward(narrow)
    assert seen and all(tensor.dtype == torch.bfloat16 for tensor in seen)
    assert two.item() == pytest.approx(one.item(), rel=0.05)
    expected, found = gradients(wide, one), gradients(narrow, two)
    assert expected.keys() == found.keys() and all(found[name].dtype == torch.float32 for name in found)
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (expected, found)]
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.97


@pytest.mark.parametrize("kind", ["dense", "deep"])
def test_masters_keep_updates_that_bfloat16_would_lose(models: dict[str, ModelConfig], kind: str) -> None:
    stage = dataclasses.replace(SFT, learning_rate=1e-7)
    learners = [
        Learner(
            settings_for(models[kind], stage, precision=precision, activation_checkpointing=precision == "bf16"),
            Memory(),
        )
        for precision in ("fp32", "bf16")
    ]
    groups = make_groups(4)
    the_plan = plan_of(groups, [[Demonstration()] * 2 for _ in groups])
    start = weights_of(learners[1])
    losses = [[learner.step(the_plan, {}).loss for _ in range(3)] for learner in learners]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    head = "lm_head.weight"
    after = weights_of(learners[1])
    assert after[head].dtype == torch.float32
    moved = after[head] != start[head]
    assert moved.float().mean() > 0.9
    assert (after[head].bfloat16() == start[head].bfloat16()).float().mean() > 0.95
    if kind == "deep":  # what is published is rounded from the masters, as the forward rounds them
        packed = {n: v for n, v in learners[1].snapshot(0).tensors.items() if isinstance(v, Fp4Tensor)}
        assert packed
        for name, value in packed.items():
            assert torch.equal(value.codes, quantize(after[name]).codes)
