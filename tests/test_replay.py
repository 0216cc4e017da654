"""Routing replay from the sampler to the learner: the experts that travel are those of one slow reading, whoever shared
a prompt, gave way or resumed, and the learner's forward uses these and no others."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import opd.model.step
from opd.actors import LocalStore, open_runtime
from opd.batching import collate
from opd.config import (
    Config,
    ConfigError,
    DataConfig,
    DomainConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
    StageConfig,
    check_config,
)
from opd.learner import Learner
from opd.logits import TileSizes
from opd.losses import token_logprobs
from opd.model import check_replay, load_model, new_v4
from opd.model.moe import rerouted
from opd.model.transformer import DeepseekV4
from opd.stats import StepStats, merge_stats
from opd.types import Group, Trajectory, no_routing
from opd.weights import save_checkpoint
from rollout.engine import V4Engine
from rollout.fleet import Fleet
from rollout.request import Request, TruncatedTrajectory
from rollout.wal import read_batch
from rollout.worker import RolloutWorker
from tests.test_learner import (
    DISTILL,
    GRPO,
    MOE,
    Memory,
    advantages_of,
    make_groups,
    make_teachers,
    plan_of,
    settings_for,
)
from tests.test_learner import VOCAB as LEARNER_VOCAB
from tests.test_rollout import (
    MAX_TOKENS,
    SAMPLED,
    SEED,
    STOP,
    TRUNCATED,
    cut_short,
    flat,
    fleet_prompt,
    requests_of,
    v4,
)

LAYERS, K = 2, 2  # of the model of test_rollout


@pytest.fixture(scope="module")
def policy() -> DeepseekV4:
    return v4(seed=0)


def engine_of(model: DeepseekV4, num_slots: int, **settings: Any) -> V4Engine:
    defaults = {"max_tokens": MAX_TOKENS, "stop_ids": [STOP], "seed": SEED, "record_routing": True}
    return V4Engine(model, num_slots=num_slots, **{**defaults, **settings})


@torch.inference_mode()
def experts_of(model: DeepseekV4, token_ids: np.ndarray) -> np.ndarray:
    """Those of the whole sequence in one forward; none for the last token, which a sampler does not read."""
    ids = torch.as_tensor(token_ids.astype(np.int64))[None]
    output = model(ids, torch.tensor([len(token_ids)]), record_routing=True)
    assert output.routing is not None
    output.routing[0, -1] = -1
    return output.routing[0].numpy()


def assert_recorded(model: DeepseekV4, trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        assert trajectory.routing.dtype == np.int16
        assert trajectory.routing.shape == (len(trajectory.token_ids), LAYERS, K)
        np.testing.assert_array_equal(trajectory.routing, experts_of(model, trajectory.token_ids), trajectory.id)


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_slots", "prefill_tokens", "num_pages"),
    [(1, 40, None), (2, 5, None), (5, 3, 9), (6, 7, 4), (7, 200, 11), (30, 29, None)],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_experts_are_those_of_one_slow_reading(
    policy: DeepseekV4,
    num_slots: int,
    prefill_tokens: int,
    num_pages: int | None,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups that share a prompt, on the shelf or off it, chunks of prompts, and requests that give up their slot."""
    if not compiled:
        monkeypatch.setattr(opd.model.step, "_fits", lambda *_: False)
    requests = requests_of(3, (3, 0, 5, 2, 7))
    engine = engine_of(policy, num_slots, prefill_tokens=prefill_tokens, num_pages=num_pages)
    engine.routing.fill_(77)
    for order in (requests, random.Random(num_slots).sample(requests, len(requests))):
        assert_recorded(policy, engine.generate(order, SAMPLED, 0))
        assert engine.preemptions > 0 or num_pages in (11, None)
        assert engine.cache.free_pages == engine.cache.num_pages


def test_a_record_changes_nothing_else_and_is_made_only_if_asked_for(policy: DeepseekV4) -> None:
    requests = requests_of(2)
    for sampling in (SAMPLED, TRUNCATED):
        plain = engine_of(policy, 5, record_routing=False).generate(requests, sampling, 0)
        recorded = engine_of(policy, 5).generate(requests, sampling, 0)
        assert_recorded(policy, recorded)
        for one, other in zip(plain, recorded, strict=True):
            assert (
                isinstance(one, TruncatedTrajectory)
                == isinstance(other, TruncatedTrajectory)
                == (sampling is TRUNCATED)
            )
            assert one.routing.shape == (len(one.token_ids), 0, 0)
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.sampler_logprobs, other.sampler_logprobs)


def test_what_a_resumed_request_has_read_is_recorded_by_reading_it_again(policy: DeepseekV4) -> None:
    """Wherever it was broken off: before its first token, on its way, or when it was complete already."""
    requests = requests_of(2)
    whole = engine_of(policy, 7).generate(requests, SAMPLED, 1)
    for seed in range(3):
        counts = [random.Random(seed * 100 + i).randint(0, t.num_loss_tokens) for i, t in enumerate(whole)]
        if seed == 2:
            counts = [t.num_loss_tokens for t in whole]
        broken = [cut_short(r, t, count, 1) for r, t, count in zip(requests, whole, counts, strict=True)]
        engine = engine_of(policy, 5, num_pages=(None, 6, 5)[seed], prefill_tokens=(40, 6, 5)[seed])
        for one, other in zip(engine.generate(broken, SAMPLED, 1), whole, strict=True):
            assert np.array_equal(one.token_ids, other.token_ids) and one.finish_reason == other.finish_reason
            assert np.array_equal(one.routing, other.routing) and one.version_spans == other.version_spans
        assert engine.cache.free_pages == engine.cache.num_pages and len(engine.free) == engine.num_slots


def test_a_worker_takes_its_record_from_packed_weights_and_its_log(tmp_path: Path) -> None:
    """A fleet whose worker is told to go on from the log of a batch that is complete."""
    save_checkpoint(tmp_path / "policy", v4(seed=10), None)
    settings = {"stop_ids": [STOP], "seed": SEED, "device": "cpu"}
    model = ModelConfig(path=str(tmp_path / "policy"), max_tokens=MAX_TOKENS)
    with open_runtime(RuntimeConfig(kind="local")) as runtime:

        def hire(index: int) -> Any:
            rollout = RolloutConfig(num_slots=6, routing_replay=True)
            return runtime.spawn(RolloutWorker, model, rollout, runtime.store, name=f"worker {index}", **settings)

        fleet = Fleet([hire(0), hire(1)], 60.0, log_dir=str(tmp_path / "wal"))
        fleet.load_checkpoint(model.path or "", 0)
        groups = fleet.generate([fleet_prompt(index) for index in (3, 0, 5, 6)], 3, SAMPLED, version=0, tag="grpo/7")
        worker = hire(0)
        worker.submit("load_checkpoint", model.path, 0).result()
        key = fleet._log_key(0)
        assert key is not None
        batch = read_batch(key)
        assert batch is not None and 3 <= len(batch.requests) < len(flat(groups)) and None not in batch.reasons
        ids = {request.trajectory_id for request in batch.requests}
        logged = [trajectory for trajectory in flat(groups) if trajectory.id in ids]
        requests = [
            Request(
                trajectory_id=t.id, prompt_id=t.prompt_id, domain=t.domain, token_ids=tuple(t.token_ids[:n].tolist())
            )
            for t in logged
            if (n := int(t.loss_mask.argmax()))
        ]
        again = worker.submit("generate", requests, SAMPLED, 0, key, resume=True).result()
    reference = policy_of(model)
    assert_recorded(reference, flat(groups))
    assert_recorded(reference, again)
    for one, other in zip(again, logged, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.routing, other.routing)


# ---- the learner -----------------------------------------------------------------------------------------------------


def test_collate_pads_the_record_with_nothing_recorded() -> None:
    one, other = make_groups(1)[0].trajectories
    one, other = (
        dataclasses.replace(t, routing=np.random.default_rng(0).integers(0, 9, (len(t.token_ids), 3, 2), np.int16))
        for t in (one, other)
    )
    routing = collate([one, other], pad_id=0).routing
    longest = max(len(one.token_ids), len(other.token_ids))
    assert routing.dtype == torch.int16 and routing.shape == (2, longest, 3, 2)
    for row, trajectory in zip(routing.numpy(), (one, other), strict=True):
        assert np.array_equal(row[: len(trajectory.routing)], trajectory.routing)
        assert (row[len(trajectory.routing) :] == -1).all()
    plain = dataclasses.replace(other, routing=no_routing(len(other.token_ids)))
    assert collate([plain, plain], pad_id=0).routing.shape == (2, len(other.token_ids), 0, 0)
    with pytest.raises(ValueError, match=r"routing of one micro-batch .* one shape; .* \[\(0, 0\), \(3, 2\)\]"):
        collate([one, plain], pad_id=0)
    with pytest.raises(ValueError, match=f"p0#0@0 has .* {len(one.token_ids) - 1}\\); they must be equal"):
        collate([dataclasses.replace(one, routing=one.routing[1:])], pad_id=0)


def sampled_by(sampler: DeepseekV4, groups: list[Group], temperature: float) -> list[Group]:
    """The groups as if the sampler had drawn them: its log-probabilities, and its experts."""

    def sampled(trajectory: Trajectory) -> Trajectory:
        ids = torch.as_tensor(trajectory.token_ids.astype(np.int64))
        with torch.no_grad():
            hidden = sampler(ids[None], torch.tensor([len(ids)])).hidden[0, :-1]
            tiles = TileSizes(tile_tokens=64, tile_vocab=64)
            logprobs, _ = token_logprobs(hidden, sampler.head, ids[1:], temperature=temperature, **tiles)
        before = np.concatenate(([0.0], logprobs.numpy()))
        return dataclasses.replace(
            trajectory,
            sampler_logprobs=np.where(trajectory.loss_mask, before, 0).astype(np.float32),
            routing=experts_of(sampler, trajectory.token_ids),
        )

    return [dataclasses.replace(g, trajectories=tuple(map(sampled, g.trajectories))) for g in groups]


def unrecorded(group: Group) -> Group:
    without = (dataclasses.replace(t, routing=no_routing(len(t.token_ids))) for t in group.trajectories)
    return dataclasses.replace(group, trajectories=tuple(without))


def policy_of(model: ModelConfig) -> DeepseekV4:
    return cast(DeepseekV4, load_model(model))


def biases_of(model: Any) -> Tensor:
    return torch.stack([block.mlp.gate.e_score_correction_bias for block in model.blocks])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekV4, ModelConfig]:
    """A sampler, and the settings of a policy with its weights whose routers would choose other experts."""
    settings = ModelConfig(config=MOE | {"mlp_layer_types": ["moe", "moe"]}, fp4="none", max_tokens=128)
    sampler = new_v4(settings, LEARNER_VOCAB, 0).eval()
    path = tmp_path_factory.mktemp("policy") / "other"
    other = new_v4(settings, LEARNER_VOCAB, 0)
    for seed, block in enumerate(other.blocks):
        bias = torch.randn(4, generator=torch.Generator().manual_seed(seed))  # chooses, and weighs nothing
        block.mlp.gate.e_score_correction_bias.copy_(bias)
    save_checkpoint(path, other, None)
    return sampler, dataclasses.replace(settings, path=str(path))


@pytest.mark.parametrize("stage", [GRPO, DISTILL], ids=["grpo", "distill"])
@pytest.mark.parametrize(
    "learner", [{}, {"micro_batch_tokens": 30, "activation_checkpointing": True}, {"zero_stage": 3}], ids=str
)
def test_the_learner_is_the_policy_that_acted(
    pair: tuple[DeepseekV4, ModelConfig], stage: StageConfig, learner: dict[str, Any]
) -> None:
    sampler, model = pair
    store, groups = Memory(), sampled_by(sampler, make_groups(4), stage.temperature)
    signals: Any = advantages_of(groups)
    heads: Any = {}
    if stage is DISTILL:
        signals, heads = make_teachers(groups, store)
    metrics, biases = [], []
    for rows in (groups, [unrecorded(group) for group in groups]):
        the_plan = plan_of(rows, signals, micro_batch_tokens=learner.get("micro_batch_tokens", 64))
        made = Learner(settings_for(model, stage, balance_bias_speed=0.01, **learner), store)
        metrics.append(merge_stats([made.step(the_plan, heads)]))
        biases.append(biases_of(made.model))
        made.close()
    replayed, routed = metrics
    assert replayed["gap/max_logprob_gap"] < 1e-5 and routed["gap/max_logprob_gap"] > 0.1
    assert replayed["gap/rerouted_share"] > 0.1 and "gap/rerouted_share" not in routed
    if stage is GRPO:  # where each trajectory is one row
        policy = policy_of(model)
        assert replayed["gap/rerouted_share"] == pytest.approx(rerouted_share(groups, policy))
        policy.update_selection_bias(load_of(groups, policy), 0.01)  # balancing counts the experts that were used
        assert torch.equal(biases[0], biases_of(policy))


def load_of(groups: list[Group], model: DeepseekV4) -> Tensor:
    """Tokens at each expert; the last of a trajectory, which has no record, where the model routes it."""
    outputs = []
    for trajectory in flat(groups):
        ids = torch.as_tensor(trajectory.token_ids.astype(np.int64))[None]
        routing = torch.as_tensor(trajectory.routing)[None]
        outputs.append(model(ids, torch.tensor([ids.shape[1]]), routing=routing).expert_load)
    return torch.stack(outputs).sum(0)


def rerouted_share(groups: list[Group], model: DeepseekV4) -> float:
    """From the definition: the policy's own choice, when all layers before it have done what the record says."""
    different = total = 0
    for trajectory in flat(groups):
        ids = torch.as_tensor(trajectory.token_ids.astype(np.int64))[None]
        routing, length = torch.as_tensor(trajectory.routing)[None], torch.tensor([ids.shape[1]])
        for layer in range(routing.shape[2]):
            rest = routing.clone()
            rest[:, :, layer:] = -1
            with torch.no_grad():
                own = model(ids, length, routing=rest, record_routing=True).routing
            assert own is not None
            given, own = (record[0, :-1, layer].sort(-1).values for record in (routing, own))
            different += int((given != own).any(-1).sum())
            total += len(given)
    assert 0 < different < total
    return different / total


def test_rerouted_is_another_set_not_another_order() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1]] * 5)
    bias = torch.tensor([0.0, 0.0, 0.2, 0.0])  # the best two are 0 and 2
    given = torch.tensor([[0, 2], [2, 0], [0, 1], [3, 1], [-1, -1]])
    assert rerouted(scores, bias, given).tolist() == [2, 4]
    assert rerouted(scores[:, :2], bias[:2], torch.tensor([[0, 1]] * 5)).tolist() == [0, 5]  # there are no others


def test_ranks_merge_by_counting() -> None:
    ranks = [
        StepStats(num_loss_tokens=1, learning_rate=0.0, rerouted=a, replayed=b) for a, b in ((1, 6), (2, 4), (0, 0))
    ]
    assert merge_stats(ranks)["gap/rerouted_share"] == 0.3
    assert "gap/rerouted_share" not in merge_stats(ranks[2:])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_student_without_learned_routing_is_refused(tmp_path: Path) -> None:
    config = Config(run=RunConfig(name="test"), data=DataConfig(domains={"d": DomainConfig(task="chain_sum")}))
    config.rollout.routing_replay = True
    check_config(config)
    config.model = ModelConfig(family="hf", path="x", fp4="none")
    with pytest.raises(ConfigError, match="rollout.routing_replay=True would be ignored: .*model.family=hf"):
        check_config(config)
    settings = ModelConfig(config=MOE | {"mlp_layer_types": ["hash_moe"] * 2}, fp4="none", max_tokens=128)
    hashed = new_v4(settings, LEARNER_VOCAB, 0)
    with pytest.raises(ConfigError, match="rollout.routing_replay=true cannot work: .*deepseek_v4.*learned routing"):
        check_replay(hashed.config)
    save_checkpoint(tmp_path, hashed, None)
    with pytest.raises(ConfigError, match="rollout.routing_replay=true cannot work"):
        RolloutWorker(
            dataclasses.replace(settings, path=str(tmp_path)),
            RolloutConfig(num_slots=2, routing_replay=True),
            LocalStore(),
            stop_ids=[STOP],
            seed=SEED,
            device="cpu",
        )
