"""Multi-token prediction: the slow oracle's numbers, and what must hold by construction.

Weights are all random, since the zeros and ones of a fresh model hide missing terms.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM

from opd.batching import MicroBatch, plan
from opd.config import ConfigError, DistillConfig, GrpoConfig, LearnerConfig, ModelConfig, OptimizerConfig, StageConfig
from opd.fp4 import fake_quantize, is_fp4_name
from opd.learner import Learner, LearnerSettings, merge_stats, mtp_weight_at
from opd.metrics import describe
from opd.model import DeepseekV4, load_model, new_v4
from opd.model.mtp import MtpBlock
from opd.model.transformer import CSA, HCA, WINDOW_ONLY, initialize, num_parameters, v4_config
from opd.muon import assign
from opd.types import Advantage, Demonstration, Group, Prompt, Trajectory, no_routing
from opd.weights import apply_snapshot, named_weights, read_tensors, save_checkpoint, snapshot_of
from tests import oracles
from tests.test_learner import gradients_of

FIELDS: dict[str, Any] = {
    "vocab_size": 26, "hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25,
    "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 4, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "layer_types": [CSA, WINDOW_ONLY, HCA], "compress_rates": {CSA: 2, HCA: 4},
    "mlp_layer_types": ["moe", "hash_moe", "moe"], "index_n_heads": 16, "index_head_dim": 8, "index_topk": 2,
    "hc_mult": 3, "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
}  # fmt: skip


@torch.no_grad()
def random_model(fp4: str = "none", seed: int = 0, **changes: Any) -> DeepseekV4:
    model = DeepseekV4(v4_config({**FIELDS, **changes}), fp4)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or name.endswith("position_bias"):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def random_rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens in every place, so padding is a random id too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIELDS["vocab_size"], (len(lengths), max(lengths)), generator=generator), torch.tensor(lengths)


def double_model(seed: int = 0, **changes: Any) -> DeepseekV4:
    """A float64 model with the oracle's frequencies."""
    model = random_model(seed=seed, **changes).double()
    for kind in ("main", "compress"):
        frequencies = oracles.rope_frequencies(model.config.rope_parameters[kind], model.config.qk_rope_head_dim)
        model.get_buffer(f"{kind}_frequencies").copy_(torch.tensor(frequencies, dtype=torch.float64))
    return model


def mtp_loss(model: DeepseekV4, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Sum over rows of the row's mean cross-entropy."""
    hidden = model(tokens, lengths, mtp=True).mtp_hidden
    losses = []
    for row, length in enumerate(lengths.tolist()):
        logits = hidden[row, : length - 2] @ model.head.T
        losses.append(F.cross_entropy(logits, tokens[row, 2:length]))
    return torch.stack(losses).sum()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


# ---- multi-token prediction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "changes"), [(0, {}), (1, {"hc_mult": 1, "swiglu_limit": 0.7, "rms_norm_eps": 1e-2})])
def test_values_are_the_oracle_s(seed: int, changes: dict[str, Any]) -> None:
    model = double_model(seed, **changes)
    lengths = [9, 3, 12]
    tokens, lengths_B = random_rows(lengths, seed)
    with torch.no_grad():
        output = model(tokens, lengths_B, mtp=True)
        without = model(tokens, lengths_B)
    sent = torch.zeros(model.config.n_routed_experts, dtype=torch.int64)
    for row, length in enumerate(lengths):
        hidden, experts = oracles.v4_mtp(model.config, model.state_dict(), tokens[row, :length].tolist())
        assert error(output.mtp_hidden[row, : length - 1], hidden) < 1e-9
        sent += torch.bincount(torch.tensor(experts).flatten(), minlength=len(sent))
    assert without.mtp_hidden is None and torch.equal(output.hidden, without.hidden)
    assert torch.equal(output.expert_load, torch.stack((*without.expert_load, sent)))
    expected = sum(
        oracles.mtp_nll(model.config, model.state_dict(), tokens[r, :n].tolist()) for r, n in enumerate(lengths)
    )
    assert mtp_loss(model, tokens, lengths_B).item() == pytest.approx(expected, rel=1e-10)


def test_gradients_are_the_oracle_s_differences() -> None:
    """Each parameter in a direction of its own: the block's, and the trunk's, which its loss reaches."""
    model = double_model(3, num_hidden_layers=1, layer_types=[HCA], mlp_layer_types=["moe"], hc_mult=2)
    tokens, lengths = random_rows([7], 3)
    mtp_loss(model, tokens, lengths).backward()
    weights = dict(model.state_dict())
    step = 1e-5
    for name, parameter in model.named_parameters():
        if name.startswith(("model.norm.", "model.hc_head.")):
            assert parameter.grad is None, "the trunk's own way to the head is not the block's"
            continue
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1, -1):
            moved = {**weights, name: parameter.detach() + sign * step * direction}
            losses.append(oracles.mtp_nll(model.config, moved, tokens[0].tolist()))
        difference = (losses[0] - losses[1]) / (2 * step)
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx(difference, rel=2e-6, abs=2e-9), name


@torch.no_grad()
def test_a_padded_row_is_the_row_alone_and_sees_one_token_ahead() -> None:
    model = random_model().double()
    lengths = [1, 2, 3, 5, 8, 20]
    tokens, lengths_B = random_rows(lengths)
    both = model(tokens, lengths_B, mtp=True)
    balance, load = 0.0, torch.zeros_like(both.expert_load)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length], torch.tensor([length]), mtp=True)
        if length > 1:
            assert error(both.mtp_hidden[row, : length - 1], alone.mtp_hidden[0, : length - 1]) < 1e-10
        balance += float(alone.balance_loss)
        load += alone.expert_load
    assert torch.equal(both.expert_load, load)
    assert int(both.expert_load[-1].sum()) == 2 * sum(length - 1 for length in lengths)
    assert float(both.balance_loss) == pytest.approx(balance, rel=1e-9)

    row = tokens[-1:]
    for changed in range(1, 20):
        other = row.clone()
        other[0, changed] = (other[0, changed] + 1) % FIELDS["vocab_size"]
        moved = (model(other, torch.tensor([20]), mtp=True).mtp_hidden[0] - both.mtp_hidden[-1]).abs().amax(-1)
        assert not moved[: changed - 1].gt(1e-10).any()
        assert moved[changed - 1] > 1e-3  # the token that follows


def test_the_block_owns_neither_embedding_nor_head_and_is_a_plain_window_layer() -> None:
    model, without = random_model(), random_model(num_nextn_predict_layers=0)
    block = model.mtp[0]
    assert isinstance(block, MtpBlock) and len(without.mtp) == 0
    assert block.self_attn.compressor is None and not block.mlp.gate.is_hash
    names = {name.removeprefix("mtp.0.") for name, _ in model.named_parameters() if name.startswith("mtp.")}
    own = {"enorm.weight", "hnorm.weight", "norm.weight", "e_proj.weight", "h_proj.weight"}
    own |= {f"hc_head.hc_{part}" for part in ("fn", "base", "scale")}
    layer = {n.removeprefix("model.layers.1.") for n, _ in model.named_parameters() if n.startswith("model.layers.1.")}
    assert names == own | layer
    assert not any(parameter.shape[0] == FIELDS["vocab_size"] for parameter in block.parameters())
    model.zero_grad()
    model(*random_rows([6]), mtp=True).mtp_hidden[0, :4].sum().backward()
    assert model.model.embed_tokens.weight.grad is not None and model.head.grad is None

    for seed in (0, 5):  # the trunk starts the same with a block and without
        initialize(model, seed)
        initialize(without, seed)
        mine = model.state_dict()
        assert all(torch.equal(mine[name], value) for name, value in without.state_dict().items())
    assert num_parameters(model) > num_parameters(without)


def test_what_cannot_be_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=2 cannot work: .* choose 1, or 0"):
        random_model(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=1 makes one"):
        random_model(num_nextn_predict_layers=0)(*random_rows([4]), mtp=True)


def test_muon_has_the_block_s_matrices() -> None:
    model = random_model()
    parts = assign(model)
    by_id = {id(parameter): name for name, parameter in model.named_parameters() if name.startswith("mtp.0.")}
    found = {
        by_id[id(p)].removeprefix("mtp.0."): blocks
        for p, blocks in zip(parts.muon, parts.blocks, strict=True)
        if id(p) in by_id
    }
    assert {name: blocks for name, blocks in found.items() if len(blocks) > 1} == {
        "self_attn.o_a_proj.weight": (8, 8),
        "mlp.experts.gate_up_proj": (32, 32),
        "attn_hc.fn": (3, 3, 9),
        "ffn_hc.fn": (3, 3, 9),
    }
    assert found["e_proj.weight"] == found["h_proj.weight"] == (32,) and found["hc_head.hc_fn"] == (3,)
    assert not any(id(parameter) in by_id for parameter in parts.decayed)
    others = {by_id[id(parameter)] for parameter in parts.undecayed if id(parameter) in by_id}
    assert others == {name for name, parameter in model.named_parameters() if name in others and parameter.ndim == 1}
    assert len(found) + len(others) == len(by_id)


def test_its_experts_are_mxfp4_like_the_others() -> None:
    rounded, plain = random_model("experts"), random_model("none")
    tokens, lengths = random_rows([9])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if is_fp4_name(name, tuple(parameter.shape), "experts"):
                parameter.copy_(fake_quantize(parameter))
    found, expected = (model(tokens, lengths, mtp=True).mtp_hidden[0, :8] for model in (rounded, plain))
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"mtp.0.mlp.experts.{leaf}"
        master, held = rounded.get_parameter(name), plain.get_parameter(name)
        assert not torch.equal(master, held) and held.grad is not None
        assert master.grad is not None and torch.equal(master.grad, held.grad)


# ---- checkpoints and snapshots ---------------------------------------------------------------------------------------


def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's tensors by the released names, with the copies that the Base checkpoints add."""
    renamed = {
        ".self_attn.": ".attn.", ".mlp.": ".ffn.", ".input_layernorm.": ".attn_norm.",
        ".post_attention_layernorm.": ".ffn_norm.", ".hc_head.hc_": ".hc_head_", ".attn_hc.": ".hc_attn_",
        ".ffn_hc.": ".hc_ffn_", ".sinks": ".attn_sink", ".q_a_norm.": ".q_norm.", ".q_a_proj.": ".wq_a.",
        ".q_b_proj.": ".wq_b.", ".kv_proj.": ".wkv.", ".o_a_proj.": ".wo_a.", ".o_b_proj.": ".wo_b.",
        ".gate.e_score_correction_bias": ".gate.bias", ".shared_experts.gate_proj.": ".shared_experts.w1.",
        ".shared_experts.down_proj.": ".shared_experts.w2.", ".shared_experts.up_proj.": ".shared_experts.w3.",
    }  # fmt: skip
    result = {}
    for name, tensor in weights.items():
        target = name
        for old, new in renamed.items():
            target = target.replace(old, new)
        if name.endswith("gate_up_proj"):
            for e, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                prefix = target.removesuffix("gate_up_proj")
                result |= {f"{prefix}{e}.w1.weight": gate.clone(), f"{prefix}{e}.w3.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            result |= {f"{target.removesuffix('down_proj')}{e}.w2.weight": m.clone() for e, m in enumerate(tensor)}
        else:
            result[target] = tensor
    result |= {"mtp.0.emb.tok_emb.weight": torch.zeros(2, 2), "mtp.0.head.weight": torch.zeros(2, 2)}
    return result


def test_checkpoints_go_to_transformers_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    save_checkpoint(tmp_path / "ours", model, None)
    settings = ModelConfig(path=str(tmp_path / "ours"), fp4="none")
    again: Any = load_model(settings, mtp=True)
    assert named_weights(again).keys() == named_weights(model).keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in named_weights(model).items())
    without: Any = load_model(settings)
    assert len(without.mtp) == 0 and without.config.num_nextn_predict_layers == 0

    with caplog.at_level(logging.INFO):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    theirs, report = loaded
    assert isinstance(theirs, DeepseekV4ForCausalLM)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "mtp." not in caplog.text
    tokens, lengths = random_rows([11])
    with torch.no_grad():
        assert error(theirs(tokens).logits, model(tokens, lengths).hidden @ model.head.T) < 3e-5

    theirs.save_pretrained(tmp_path / "theirs")  # keeps the field in its config and drops the tensors
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        back: Any = load_model(dataclasses.replace(settings, path=str(tmp_path / "theirs")), mtp=True)
    assert "asks for multi-token prediction" in caplog.text
    assert len(back.mtp) == 0 and back.config.num_nextn_predict_layers == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())


def test_the_released_names_are_read(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(tmp_path / "own", model, None)
    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    block = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    assert "mtp.0.ffn.experts.5.w3.weight" in released(block) and "mtp.0.hc_head_fn" in released(block)
    save_file({**tensors, **released(block)}, file)
    again: Any = load_model(ModelConfig(path=str(tmp_path / "own"), fp4="none"), mtp=True)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert read_tensors(tmp_path / "own").keys() == tensors.keys()


def test_a_snapshot_leaves_the_block_behind() -> None:
    model, sampler = random_model("experts"), random_model(num_nextn_predict_layers=0, seed=1)
    snapshot = snapshot_of(model, 3, "experts")
    assert snapshot.tensors.keys() == named_weights(sampler).keys()
    apply_snapshot(sampler, snapshot)
    tokens, lengths = random_rows([9])
    with torch.no_grad():
        assert torch.equal(sampler(tokens, lengths).hidden, model(tokens, lengths).hidden)
    other = random_model(seed=2)
    kept = {name: value.clone() for name, value in other.state_dict().items() if name.startswith("mtp.")}
    apply_snapshot(other, snapshot)
    assert kept and all(torch.equal(other.state_dict()[name], value) for name, value in kept.items())


# ---- the learner -----------------------------------------------------------------------------------------------------


class Nothing:
    """A store for stages that fetch nothing."""

    def put(self, value: Any) -> Any:
        raise AssertionError

    def get(self, handle: Any) -> Any:
        raise AssertionError


def make_groups(num: int) -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for g in range(num):
        prompt, length = 1 + g % 3, int(rng.integers(1, 9))
        mask = np.arange(prompt + length) >= prompt
        trajectory = Trajectory(
            id=f"p{g}#0@0", prompt_id=f"p{g}", domain="sums", loss_mask=mask, version_spans=(), finish_reason="stop",
            token_ids=rng.integers(0, FIELDS["vocab_size"], prompt + length).astype(np.int32),
            sampler_logprobs=np.where(mask, -3.0, 0.0).astype(np.float32), routing=no_routing(prompt + length),
        )  # fmt: skip
        prompt = Prompt(id=f"p{g}", domain="sums", effort="none", token_ids=(0,), reference={})
        groups.append(Group(prompt=prompt, trajectories=(trajectory,)))
    return groups


def learner_for(folder: Path, stage: StageConfig, optimizer: str = "muon", **learner: Any) -> Learner:
    fields = ("num_nextn_predict_layers", "vocab_size")
    model = ModelConfig(config={k: v for k, v in FIELDS.items() if k not in fields}, fp4="none", max_tokens=64)
    if not (folder / "start").exists():
        start = dataclasses.replace(model, config={**model.config, "num_nextn_predict_layers": 1})
        save_checkpoint(folder / "start", new_v4(start, FIELDS["vocab_size"], 0), None)
    model = dataclasses.replace(model, path=str(folder / "start"))
    config = LearnerConfig(micro_batch_tokens=16, grad_clip=0.0, optimizer=OptimizerConfig(name=optimizer), **learner)
    return Learner(LearnerSettings(model=model, learner=config, stage=stage, total_steps=10), Nothing())


SFT = StageConfig(learning_rate=1e-3, warmup_steps=0, mtp_weight=0.4, indexer_loss=0.0)


def test_demonstrations_train_block_and_trunk(tmp_path: Path) -> None:
    groups = make_groups(7)
    signals = [[Demonstration()] for _ in groups]
    learner = learner_for(tmp_path, SFT, balance_loss=0.0)
    model: Any = load_model(learner.settings.model, mtp=True)
    total, ahead, count, count_ahead = torch.zeros(()), torch.zeros(()), 0, 0
    for group in groups:
        for trajectory in group.trajectories:
            ids = torch.as_tensor(trajectory.token_ids.astype(np.int64))
            output = model(ids[None], torch.tensor([len(ids)]), mtp=True)
            logprobs, logprobs_ahead = (
                torch.log_softmax(hidden[0] @ model.head.T, -1) for hidden in (output.hidden, output.mtp_hidden)
            )
            for t in np.flatnonzero(trajectory.loss_mask).tolist():
                total, count = total - logprobs[t - 1, ids[t]], count + 1
                if t >= 2:
                    ahead, count_ahead = ahead - logprobs_ahead[t - 2, ids[t]], count_ahead + 1
    assert count_ahead < count  # a prompt of one token
    (total / count + 0.4 * ahead / count_ahead).backward()

    before = {name: value.clone() for name, value in named_weights(learner.model).items()}
    seen, stats = gradients_of(learner, plan(groups, signals, num_ranks=1, micro_batch_tokens=16), {})
    metrics = merge_stats([stats])
    assert metrics["sft/mtp_nll"] == pytest.approx(ahead.item() / count_ahead, rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert describe("sft/mtp_nll")
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (seen.get(name, torch.zeros_like(parameter)) - expected).norm() <= 1e-5 * norm, name
    after = named_weights(learner.model)
    assert all(not torch.equal(after[n], before[n]) for n in before if n.startswith("mtp.") and "hc" not in n)
    bias = "mtp.0.mlp.gate.e_score_correction_bias"
    assert after[bias].abs().max() == pytest.approx(1e-3) and not before[bias].any()
    assert not any(name.startswith("mtp.") for name in learner.snapshot(1).tensors)

    learner.save(tmp_path / "saved")
    the_plan = plan(groups, signals, num_ranks=1, micro_batch_tokens=16)
    unbroken = merge_stats([learner.step(the_plan, {})])
    resumed = learner_for(tmp_path, SFT, balance_loss=0.0)
    resumed.load(tmp_path / "saved")
    assert merge_stats([resumed.step(the_plan, {})]) == unbroken
    assert all(torch.equal(w, named_weights(resumed.model)[name]) for name, w in named_weights(learner.model).items())
    with pytest.raises(ConfigError, match="mtp_weight > 0=True, this run has mtp_weight > 0=False"):
        learner_for(tmp_path, dataclasses.replace(SFT, mtp_weight=0.0)).load(tmp_path / "saved")


def test_a_step_with_nothing_to_predict_ahead_is_a_step(tmp_path: Path) -> None:
    groups = make_groups(1)
    trajectory = dataclasses.replace(
        groups[0].trajectories[0], token_ids=np.array([1, 2], np.int32), loss_mask=np.array([False, True]),
        sampler_logprobs=np.zeros(2, np.float32), routing=no_routing(2),
    )  # fmt: skip
    groups = [Group(prompt=groups[0].prompt, trajectories=(trajectory,))]
    learner = learner_for(tmp_path, SFT)
    stats = learner.step(plan(groups, [[Demonstration()]], num_ranks=1, micro_batch_tokens=16), {})
    assert not stats.skipped and "sft/mtp_nll" not in merge_stats([stats])


@pytest.mark.parametrize(("optimizer", "zero_stage"), [("muon", 0), ("adamw", 1)])
def test_other_stages_keep_the_block_as_it_is(tmp_path: Path, optimizer: str, zero_stage: int) -> None:
    """Not even weight decay moves it, nor the zero gradients of an empty micro-batch."""
    groups = make_groups(4)
    stage = GrpoConfig(learning_rate=1e-2, warmup_steps=0, kl_coefficient=0.1)
    learner = learner_for(tmp_path, stage, optimizer, zero_stage=zero_stage)
    before = {name: value.clone() for name, value in named_weights(learner.model).items()}
    the_plan = plan(groups, [[Advantage(value=1.0)] for _ in groups], num_ranks=1, micro_batch_tokens=16)
    the_plan = dataclasses.replace(the_plan, ranks=((*the_plan.ranks[0], MicroBatch(items=())),))
    stats = learner.step(the_plan, {})
    assert "sft/mtp_nll" not in merge_stats([stats])
    after = named_weights(learner.model)
    assert all(torch.equal(after[n], before[n]) == n.startswith("mtp.") for n in after if n.endswith("o_b_proj.weight"))
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("mtp."))
    learner.save(tmp_path / "saved")
    learner.finish_saving()
    kept: Any = load_model(dataclasses.replace(learner.settings.model, path=str(tmp_path / "saved" / "hf")), mtp=True)
    assert all(torch.equal(kept.state_dict()[n], before[n]) for n in before if n.startswith("mtp."))


def test_the_weight_falls_to_a_third_with_the_rate() -> None:
    stage = StageConfig(decay_fraction=0.3)
    assert [mtp_weight_at(step, stage, 10) for step in (0, 6)] == [0.3, 0.3]
    assert [mtp_weight_at(step, stage, 10) for step in (7, 9)] == pytest.approx([0.1, 0.1])
    assert mtp_weight_at(9, StageConfig(), 10) == 0.3
    assert GrpoConfig().mtp_weight == DistillConfig().mtp_weight == 0.0
