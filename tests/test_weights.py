"""Snapshots and checkpoints: what is written comes back bit for bit, opens in transformers, and is refused if torn."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

from opd.chat import Chat, train_tokenizer
from opd.config import ConfigError
from opd.fp4 import dequantize, quantize
from opd.types import Fp4Tensor, WeightSnapshot
from opd.weights import (
    apply_snapshot,
    checkpoint_hash,
    head_hash,
    load_model_config,
    load_snapshot,
    named_weights,
    read_tensors,
    resolve_checkpoint,
    save_checkpoint,
    save_snapshot,
    snapshot_of,
)

Change = Callable[[dict[str, Any]], object]  # breaks the tensors of a file or a snapshot
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    """Every kind of layer and of tensor, all of them random: zeros and ones would hide a swapped name."""
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, partial_rotary_factor=0.25, q_lora_rank=24, o_groups=2, o_lora_rank=16,
        sliding_window=8, n_routed_experts=11, num_experts_per_tok=2, layer_types=list(KINDS),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe"], index_n_heads=4, index_head_dim=16, index_topk=4,
        max_position_embeddings=256, num_nextn_predict_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(config).eval()
    for name, tensor in named_weights(model).items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(64, 11).argsort(-1)[:, :2])
        else:
            tensor.normal_()
    return model


@pytest.fixture(scope="module")
def saved(model: DeepseekV4ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


class Configured(nn.Linear):
    """The least that has weights and a config."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.config = DeepseekV4Config(vocab_size=8)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_snapshot_round_trip_is_bitwise_and_packs_the_experts(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    snapshot = snapshot_of(model, 7, "experts")
    save_snapshot(tmp_path / "a" / "snapshot.safetensors", snapshot)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["snapshot.safetensors"]
    loaded = load_snapshot(tmp_path / "a" / "snapshot.safetensors")

    assert loaded.policy_version == 7 and loaded.tensors.keys() == snapshot.tensors.keys()
    packed = [name for name, value in snapshot.tensors.items() if isinstance(value, Fp4Tensor)]
    assert len(packed) == 6 and all(".experts." in name for name in packed)
    for name, value in snapshot.tensors.items():
        other = loaded.tensors[name]
        if isinstance(value, Fp4Tensor):
            assert isinstance(other, Fp4Tensor) and other.shape == value.shape
            assert torch.equal(other.codes, value.codes) and torch.equal(other.scales, value.scales)
        else:
            assert isinstance(other, torch.Tensor) and other.dtype == value.dtype and torch.equal(other, value)


def test_applied_snapshot_is_the_dequantised_model_and_a_copy(model: DeepseekV4ForCausalLM) -> None:
    snapshot = snapshot_of(model, 1, "experts")
    other = DeepseekV4ForCausalLM(model.config).bfloat16()
    storage = {name: tensor.data_ptr() for name, tensor in named_weights(other).items()}
    apply_snapshot(other, snapshot)
    for name, tensor in named_weights(other).items():
        expected = named_weights(model)[name]
        if ".experts." in name:
            assert not torch.equal(expected, dequantize(quantize(expected)))  # the test can tell
            expected = dequantize(quantize(expected))
        assert tensor.data_ptr() == storage[name], name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name

    layer = nn.Linear(4, 4)
    unchanged = snapshot_of(layer, 0, "none")
    before = layer.weight.detach().clone()
    layer.weight.data.zero_()
    assert torch.equal(unchanged.tensors["weight"], before)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("1.bias"), "lacks 1 tensors of the model, first '1.bias'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "that the model lacks, first 'extra'"),
        (lambda tensors: tensors.update({"1.weight": torch.zeros(2, 3)}), r"'1.weight' has shape \(2, 3\)"),
        (lambda tensors: tensors.update({"1.weight": torch.ones(3, 3).int()}), "'1.weight' is torch.int32"),
    ],
)
def test_apply_is_strict_and_writes_nothing_when_it_refuses(change: Change, message: str) -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    snapshot = snapshot_of(layers, 3, "none")
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(1)
    before = [parameter.clone() for parameter in layers.parameters()]
    change(snapshot.tensors)
    with pytest.raises(ValueError, match=message):
        apply_snapshot(layers, snapshot)
    assert all(torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))


def test_load_snapshot_refuses_what_is_none(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.safetensors does not exist"):
        load_snapshot(tmp_path / "nothing.safetensors")
    with pytest.raises(ConfigError, match="not a weight snapshot"):
        load_snapshot(saved / "model.safetensors")
    save_snapshot(tmp_path / "torn", WeightSnapshot(policy_version=0, tensors={"a": torch.ones(100)}))
    os.truncate(tmp_path / "torn", 300)
    with pytest.raises(ConfigError, match="torn is not a complete safetensors file"):
        load_snapshot(tmp_path / "torn")


def test_checkpoint_opens_in_transformers_and_nothing_else(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    chat = Chat(train_tokenizer(["a small text"], 300))
    folder = tmp_path / "run" / "hf"
    save_checkpoint(folder, model, chat)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    opened, loading = loaded
    assert not any(loading.values()), loading
    assert_same(opened.state_dict(), dict(model.state_dict()))
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["DeepseekV4ForCausalLM"] and written["dtype"] == "float32"
    assert opened.generation_config.eos_token_id == model.config.eos_token_id
    assert Chat.load(str(folder)).tokenizer.get_vocab() == chat.tokenizer.get_vocab()
    assert_same(read_tensors(folder), dict(model.state_dict()))


def test_checkpoint_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Configured(), Configured()
    save_checkpoint(tmp_path / "hf", old, None)
    (tmp_path / "hf" / "stale").touch()

    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path / "hf", new, None)
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["weight"], old.weight)
    save_checkpoint(tmp_path / "hf", new, None)
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["weight"], new.weight)
    assert not (tmp_path / "hf" / "stale").exists() and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_parameters_that_are_views_of_one_flat_buffer(tmp_path: Path) -> None:
    """An optimizer may move all parameters into one buffer; each is still written, and copied, as itself."""
    layer = Configured()
    expected = {name: tensor.clone() for name, tensor in named_weights(layer).items()}
    flat = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    layer.weight.data, layer.bias.data = flat[:9].view(3, 3), flat[9:]
    save_checkpoint(tmp_path / "hf", layer, None)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    snapshot = snapshot_of(layer, 0, "none")
    save_snapshot(tmp_path / "s", snapshot)
    flat.zero_()
    assert_same(snapshot.tensors, expected)  # pyright: ignore[reportArgumentType]
    assert_same(load_snapshot(tmp_path / "s").tensors, expected)  # pyright: ignore[reportArgumentType]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    embed, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embed.weight
    tied = nn.ModuleDict({"embed": embed, "head": head})
    snapshot = snapshot_of(tied, 0, "none")
    assert list(snapshot.tensors) == ["embed.weight"]
    save_snapshot(tmp_path / "s", snapshot)
    embed.weight.data.zero_()
    apply_snapshot(tied, load_snapshot(tmp_path / "s"))
    assert head.weight is embed.weight and head.weight.abs().min() > 0


def test_reads_the_layout_that_transformers_writes(model: DeepseekV4ForCausalLM, saved: Path, tmp_path: Path) -> None:
    expected = dict(model.state_dict())
    assert any(name.endswith("ffn.experts.10.w1.weight") for name in load_file(saved / "model.safetensors"))
    assert_same(read_tensors(saved), expected)  # 11 experts: text order is not number order
    assert_same(read_tensors(saved / "model.safetensors"), expected)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same(read_tensors(tmp_path / "sharded"), expected)


def test_reads_the_published_layout(model: DeepseekV4ForCausalLM, saved: Path, tmp_path: Path) -> None:
    """The published files have no leading "model.", name the embedding and the stream head otherwise, and carry MTP."""
    published = {name.removeprefix("model."): value for name, value in load_file(saved / "model.safetensors").items()}
    published["embed.weight"] = published.pop("embed_tokens.weight")
    for part in ("fn", "base", "scale"):
        published[f"hc_head_{part}"] = published.pop(f"hc_head.hc_{part}")
    for name in [name for name in published if name.endswith(".attn.norm.weight")]:
        published[name.replace(".attn.norm.", ".attn.kv_norm.")] = published.pop(name)
    published |= {"mtp.0.attn.wkv.weight": torch.zeros(1), "mtp.0.norm.weight": torch.zeros(1)}
    save_file(published, tmp_path / "model.safetensors")
    assert_same(read_tensors(tmp_path / "model.safetensors"), dict(model.state_dict()))
    ahead = {name: torch.zeros(1) for name in ("mtp.0.self_attn.kv_proj.weight", "mtp.0.norm.weight")}
    assert_same(read_tensors(tmp_path / "model.safetensors", mtp=True), {**model.state_dict(), **ahead})


def broken(saved: Path, tmp_path: Path, change: Change) -> Path:
    """A copy of the saved folder with `change` applied to its tensors."""
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    shutil.copytree(saved, tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    return tmp_path / "broken"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.ffn.experts.3.w2.weight"), r"lacks expert 3 of layers.1.mlp.experts.\*.w2"),
        (lambda t: t.pop("model.layers.1.ffn.experts.10.w3.weight"), "11 w1, 11 w2 and 10 w3"),
        (lambda t: t.update({"lm_head.weight": t["head.weight"] + 0}), "two tensors that mean 'lm_head.weight'"),
        (lambda t: t.update({"head.weight": t["head.weight"].to(torch.float8_e4m3fn)}), "'head.weight' is quantised"),
        (lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(1)}), "both stacked and as single"),
    ],
)
def test_read_tensors_refuses_incomplete_and_quantised_weights(
    saved: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tensors(broken(saved, tmp_path, change))


def test_read_tensors_refuses_by_path_what_is_no_checkpoint(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path | str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            read_tensors(path)
        assert str(path) in str(caught.value)

    refused(tmp_path / "missing", "missing does not exist; expected a checkpoint folder")
    refused("no-such-organisation/no-such-model", "can not be fetched from the hub")
    step = tmp_path / "step_4"
    shutil.copytree(saved, step / "hf")
    refused(step, "step_4 holds no config.json.*did you mean .*step_4/hf")
    assert resolve_checkpoint(step / "hf") == step / "hf"

    weights = step / "hf" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    refused(step / "hf", "model.safetensors is not a complete safetensors file")
    weights.write_bytes(b"")
    refused(step / "hf", "model.safetensors is not a complete safetensors file")
    weights.unlink()
    refused(step / "hf", "holds no weights; expected model.safetensors or model.safetensors.index.json")
    (step / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(step / "hf", "pytorch_model.bin is not a safetensors file, and pickled weights are never loaded")
    with pytest.raises(ConfigError, match="pickled weights are never loaded"):
        read_tensors(step / "hf" / "pytorch_model.bin")

    (step / "hf" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(1)}, weights)
    refused(step / "hf", "model of type 'llama'; expected 'deepseek_v4'")
    (step / "hf" / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ConfigError, match="not a config that transformers reads"):
        load_model_config(step / "hf")
    (step / "hf" / "config.json").write_text('{"model_')
    refused(step / "hf", "config.json is not readable as JSON")


def test_read_tensors_refuses_a_broken_index(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"])
    for shard, message in (
        ("../model.safetensors", "outside its folder"),
        ("pytorch_model-1.bin", "pickled weights are never loaded"),
        ("model-99.safetensors", "model-99.safetensors does not exist"),
        (max(content["weight_map"].values()), f"lacks '{first}'"),
    ):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], first: shard}}))
        with pytest.raises(ConfigError, match=message):
            read_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        read_tensors(tmp_path)


def test_head_hash_sees_dtype_shape_and_every_bit() -> None:
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    changed = head.clone()
    changed.view(torch.int32)[5, 3] ^= 1
    others = [changed, head.reshape(4, 6), head.reshape(4, 6).T, head.view(torch.int32), head.bfloat16()]
    assert head_hash(head) == head_hash(nn.Parameter(head.T.contiguous().T))  # layout in memory is not content
    assert len({head_hash(tensor) for tensor in [head, *others]}) == 6


def test_checkpoint_hash_is_of_the_weights_alone(model: DeepseekV4ForCausalLM, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert checkpoint_hash(tmp_path / "sharded") == checkpoint_hash(saved)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"].view(torch.int32)[0, 0] ^= 1

    assert checkpoint_hash(broken(saved, tmp_path, flip)) != checkpoint_hash(saved)
