"""Adapters: a model of the published names to everybody else, and nothing but thin matrices to the optimizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from opd.config import ConfigError, LoraConfig, ModelConfig
from opd.learner import Learner
from opd.model.hub import load_hub_model
from opd.types import Demonstration
from opd.weights import apply_snapshot, named_weights
from tests.test_learner import SFT, VOCAB, Memory, make_groups, plan_of, settings_for, weights_of

LORA = LoraConfig(rank=3, alpha=12.0)
PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3]]


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":  # matrices are stored transposed, head and embedding are one
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return Qwen3(Qwen3Config(vocab_size=VOCAB, **shape, **heads))


def model_config(folder: Path, kind: str, **lora: Any) -> ModelConfig:
    build(kind).save_pretrained(folder / kind)
    return ModelConfig(family="hf", path=str(folder / kind), fp4="none", lora=dataclasses.replace(LORA, **lora))


def train(learner: Learner, steps: range) -> list[Any]:
    stats = []
    for step in steps:
        groups = make_groups(3, seed=step)
        stats.append(learner.step(plan_of(groups, [[Demonstration()] * 2 for _ in groups]), {}))
    return stats


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_everyone_else_sees_the_published_model(kind: str, tmp_path: Path) -> None:
    config = model_config(tmp_path, kind)
    learner = Learner(settings_for(config, dataclasses.replace(SFT, learning_rate=0.02)), Memory())
    plain = load_hub_model(config.path or "")
    torch.testing.assert_close(learner.probe(PROMPTS), reference_logprobs(plain))  # adapters start as nothing
    train(learner, range(4))
    assert all("lora_" in name for name, p in learner.model.named_parameters() if p.requires_grad)

    snapshot = learner.snapshot(1)
    assert snapshot.tensors.keys() == named_weights(plain).keys()
    apply_snapshot(plain, snapshot)
    trained = learner.probe(PROMPTS)
    torch.testing.assert_close(trained, reference_logprobs(plain), rtol=0, atol=2e-6)
    original = load_hub_model(config.path or "")
    assert abs(trained - reference_logprobs(original)).max() > 0.01
    changed = {n for n, w in named_weights(original).items() if not torch.equal(w, named_weights(plain)[n])}
    wanted = 8 if kind == "gpt2" else 14  # all matrices of two layers, and neither embedding nor head
    assert len(changed) == wanted and all("layers" in name or ".h." in name for name in changed)

    learner.save(tmp_path / "step_4")
    learner.finish_saving()
    saved = load_hub_model(str(tmp_path / "step_4" / "hf"))
    assert all(torch.equal(w, snapshot.tensors[n]) for n, w in named_weights(saved).items())  # type: ignore[arg-type]
    base = AutoModelForCausalLM.from_pretrained(config.path or "")
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "step_4" / "adapter")).eval()
    token_ids = torch.tensor([PROMPTS[0]])
    logits = adapted(input_ids=token_ids).logits
    hidden = saved(token_ids, torch.tensor([5])).hidden
    torch.testing.assert_close(logits, hidden @ saved.head.T, rtol=0, atol=1e-5)


def reference_logprobs(model: Any) -> Any:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            hidden = model(ids, torch.tensor([len(prompt)])).hidden[0, :-1]
        rows.append((hidden @ model.head.T).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(rows).detach().numpy()


@pytest.mark.parametrize(("optimizer", "zero_stage"), [("adamw", 0), ("adamw", 3), ("muon", 2)])
def test_a_restored_learner_goes_on_bitwise(tmp_path: Path, optimizer: str, zero_stage: int) -> None:
    config = model_config(tmp_path, "qwen3")
    settings = settings_for(config, SFT, optimizer=optimizer, zero_stage=zero_stage)
    learner = Learner(settings, Memory())
    train(learner, range(2))
    learner.save(tmp_path / "step_2")
    expected = train(learner, range(2, 4))
    learner.finish_saving()
    resumed = Learner(settings, Memory())
    resumed.load(tmp_path / "step_2")
    for one, two in zip(expected, train(resumed, range(2, 4)), strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(two, seconds=0.0)
    one, two = learner._engine.weights(), resumed._engine.weights()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    moved = load_hub_model(config.path or "")
    torch.nn.init.ones_(moved.head)
    moved._inner.save_pretrained(tmp_path / "moved")
    stranger = Learner(
        dataclasses.replace(settings, model=dataclasses.replace(config, path=str(tmp_path / "moved"))), Memory()
    )
    with pytest.raises(ConfigError, match=r"was saved with model\.path="):
        stranger.load(tmp_path / "step_2")


def test_targets_are_chosen_by_name(tmp_path: Path) -> None:
    learner = Learner(settings_for(model_config(tmp_path, "qwen3", targets=["q_proj", "v_proj"]), SFT), Memory())
    names = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    assert len(names) == 8 and all(".q_proj." in name or ".v_proj." in name for name in names)
    assert sum(fragment.value.numel() for fragment in learner._engine.state()) == 0
    before = weights_of(learner)
    train(learner, range(1))
    assert {n for n, w in weights_of(learner).items() if not torch.equal(w, before[n])} <= names
    with pytest.raises(ConfigError, match=r"model\.lora\.targets names \['lm_head'\]; .*'q_proj'"):
        Learner(settings_for(model_config(tmp_path, "qwen3", targets=["lm_head"]), SFT), Memory())
