"""Teachers: hidden states that verify against their own head and no other, whatever the batching and residency."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import teachers.shelf
from opd.chat import Chat, train_tokenizer
from opd.config import Config, ConfigError, DomainConfig, ModelConfig, TeacherConfig, teacher_routes
from opd.fp4 import dequantize, quantize
from opd.losses import logsumexp_at
from opd.model import load_model
from opd.model.transformer import DeepseekV4, initialize, v4_config
from opd.types import Group, Prompt, Store, TeacherHead, TeacherHidden, Trajectory, VersionSpan, no_routing
from opd.weights import head_hash, save_checkpoint
from teachers.local import TeacherHost
from teachers.pool import TeacherPool, check_teachers, place
from teachers.shelf import Checkpoint, Shelf

VOCAB = 300  # of every model and tokenizer here
LENGTHS = (9, 17, 5, 30, 12, 9)
TOLERANCE = 1e-3  # at which a probe counts as wrong


class MemoryStore:
    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def get(self, handle: int) -> Any:
        return self.values[handle]


@dataclass
class Done:
    value: Any
    error: Exception | None = None

    def result(self, timeout_seconds: float | None = None) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class InProcess:
    """Runs each method at once, and notes what it was asked to do."""

    def __init__(self, name: str, target: TeacherHost) -> None:
        self.name = name
        self.target = target
        self.asked: list[str] = []

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Done:
        self.asked.append(f"{method} {args[0]}" if method == "score" else method)
        try:
            return Done(getattr(self.target, method)(*args, **kwargs))
        except Exception as error:
            return Done(None, error)


def v4(seed: int, hidden_size: int = 32) -> DeepseekV4:
    fields = {
        "vocab_size": VOCAB, "hidden_size": hidden_size, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25,
        "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["moe", "moe"], "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4,
        "max_position_embeddings": 256, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    model = DeepseekV4(v4_config(fields))
    initialize(model, seed)
    nn.init.uniform_(model.model.norm.weight, 0.5, 3.0)  # a norm of ones would hide a state taken before it
    return model


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(train_tokenizer(["how much is one and one, and how do you spell it"], VOCAB))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, chat: Chat) -> dict[str, str]:
    """Checkpoints: two V4 models, and one of another family and width."""
    root = tmp_path_factory.mktemp("specialists")
    for seed, name in enumerate(("one", "two")):
        save_checkpoint(root / name, v4(seed), chat)
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    qwen = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, hidden_size=48, intermediate_size=32, **shape))
    qwen.save_pretrained(root / "qwen")
    chat.save(root / "qwen")
    return {name: str(root / name) for name in ("one", "two", "qwen")}


def trajectory(index: int, length: int, domain: str = "a") -> Trajectory:
    """Random ids; even ones are a prompt and a completion, odd ones have two completions with a gap."""
    rng = np.random.default_rng(index)
    loss_mask = np.arange(length) >= length // 2
    if index % 2:
        loss_mask[1] = True
        loss_mask[-2:] = False
    return Trajectory(
        id=f"{domain}/train/{index}#0@0",
        prompt_id=f"{domain}/train/{index}",
        domain=domain,
        token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
        loss_mask=loss_mask,
        sampler_logprobs=np.zeros(length, dtype=np.float32),
        version_spans=(VersionSpan(start=0, policy_version=0),),
        finish_reason="stop",
        routing=no_routing(length),
    )


TRAJECTORIES = [trajectory(index, length) for index, length in enumerate(LENGTHS)]


def host_of(teachers: dict[str, TeacherConfig], store: Store, **changes: Any) -> TeacherHost:
    settings = {"fp4": "none", "threads": 1, "device": "cpu", "micro_batch_tokens": 64, "hidden_dtype": torch.float32}
    return TeacherHost(teachers, store, **{**settings, **changes})


def score(
    host: TeacherHost,
    teacher: str,
    trajectories: list[Trajectory] = TRAJECTORIES,
    weight: float = 1.0,
    then: str | None = None,
) -> list[TeacherHidden]:
    """Of a teacher whose weights are here."""
    signals: list[TeacherHidden] = []
    for signal in host.score(teacher, trajectories, weight, then):
        assert isinstance(signal, TeacherHidden)
        signals.append(signal)
    return signals


def scored(path: str, family: str = "deepseek_v4", **changes: Any) -> tuple[list[torch.Tensor], list[TeacherHidden]]:
    store = MemoryStore()
    host = host_of({"t": TeacherConfig(path=path, family=family)}, store, **changes)
    signals = score(host, "t", TRAJECTORIES, 0.5)
    return [store.get(signal.hidden) for signal in signals], signals


def probe_error(hidden: torch.Tensor, signal: TeacherHidden, head: torch.Tensor) -> float:
    """What a reader computes: the largest difference between its log-sum-exp at the probes and the teacher's."""
    found = logsumexp_at(hidden[list(signal.probe_positions)], head)
    return (found - torch.tensor(signal.probe_lse)).abs().max().item()


@pytest.mark.parametrize(("name", "family"), [("one", "deepseek_v4"), ("qwen", "hf")])
def test_entry_s_predicts_the_sth_loss_token_and_batching_changes_nothing(
    name: str, family: str, paths: dict[str, str]
) -> None:
    model = load_model(ModelConfig(family=family, path=paths[name], fp4="none"))
    ragged, signals = scored(paths[name], family)
    for given, hidden, signal in zip(TRAJECTORIES, ragged, signals, strict=True):
        whole = model(torch.from_numpy(given.token_ids).long()[None], torch.tensor([len(given.token_ids)])).hidden[0]
        expected = torch.stack([whole[t - 1] for t in range(len(given.token_ids)) if given.loss_mask[t]])
        assert hidden.shape == expected.shape and torch.allclose(hidden, expected, atol=1e-5)
        assert (signal.teacher, signal.weight) == ("t", 0.5)
    for micro_batch_tokens in (1, 10_000):  # every trajectory alone; all of them at once
        for hidden, other in zip(
            ragged, scored(paths[name], family, micro_batch_tokens=micro_batch_tokens)[0], strict=True
        ):
            assert torch.allclose(hidden, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_verify_with_their_own_head_only(dtype: torch.dtype, paths: dict[str, str]) -> None:
    store = MemoryStore()
    teachers = {name: TeacherConfig(path=paths[name]) for name in ("one", "two")}
    host = host_of(teachers, store, hidden_dtype=dtype)
    heads = host.heads()
    assert len(store.values) == 2 and host.heads() == heads and len(store.values) == 2
    for name, other in (("one", "two"), ("two", "one")):
        head: TeacherHead = heads[name]
        weight = store.get(head.weight)
        assert weight.dtype == torch.float32 and weight.shape == (head.vocab_size, 32) and head.vocab_size == VOCAB
        assert head.teacher == name and head.content_hash == head_hash(weight)
        for given, signal in zip(TRAJECTORIES, score(host, name), strict=True):
            hidden = store.get(signal.hidden)
            num = given.num_loss_tokens
            assert hidden.dtype == dtype and hidden.shape == (num, 32) and not hidden.requires_grad
            assert signal.probe_positions == tuple(sorted({0, num // 2, num - 1}))
            assert signal.head_hash == head.content_hash != heads[other].content_hash
            assert probe_error(hidden, signal, weight) < 1e-5  # rounding to bfloat16 included
            assert probe_error(hidden, signal, store.get(heads[other].weight)) > TOLERANCE


def test_a_state_before_the_final_norm_fails_the_probe(paths: dict[str, str]) -> None:
    before_norm: list[torch.Tensor] = []
    model: Any = load_model(ModelConfig(path=paths["one"], fp4="none"))
    model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    states, signals = scored(paths["one"])
    for given, hidden, signal in zip(TRAJECTORIES, states, signals, strict=True):
        model(torch.from_numpy(given.token_ids).long()[None], torch.tensor([len(given.token_ids)]))
        planted = before_norm[-1][given.loss_mask.nonzero()[0] - 1]  # one row, so its tokens are the norm's rows
        assert probe_error(hidden, signal, model.head) < 1e-5
        assert probe_error(planted, signal, model.head) > TOLERANCE


def test_rounding_is_the_only_difference_of_bfloat16(paths: dict[str, str]) -> None:
    for exact, rounded in zip(
        scored(paths["one"])[0], scored(paths["one"], hidden_dtype=torch.bfloat16)[0], strict=True
    ):
        assert torch.equal(rounded, exact.bfloat16())
    with pytest.raises(ValueError, match=r"hidden_dtype=torch\.float16 is not allowed"):
        scored(paths["one"], hidden_dtype=torch.float16)


def test_a_teacher_uses_the_students_fp4(paths: dict[str, str], tmp_path: Path, chat: Chat) -> None:
    rounded: Any = load_model(ModelConfig(path=paths["one"], fp4="none"))
    for name, parameter in rounded.named_parameters():
        if ".experts." in name:
            parameter.data.copy_(dequantize(quantize(parameter)))
    save_checkpoint(tmp_path / "rounded", rounded, chat)
    quantised, expected = scored(paths["one"], fp4="experts")[0], scored(str(tmp_path / "rounded"))[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(quantised, expected, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(quantised, scored(paths["one"])[0], strict=True))


def test_a_teacher_that_is_not_finite_is_named_with_the_trajectory(tmp_path: Path, chat: Chat) -> None:
    broken = v4(0)
    culprit = TRAJECTORIES[3]
    others = {token for given in TRAJECTORIES if given is not culprit for token in given.token_ids.tolist()}
    planted = next(token for token in culprit.token_ids.tolist() if token not in others)
    broken.model.embed_tokens.weight.data[planted] = torch.nan
    save_checkpoint(tmp_path / "nan", broken, chat)
    with pytest.raises(ValueError, match=f"teacher 't' .*nan.* not finite on trajectory '{culprit.id}'"):
        scored(str(tmp_path / "nan"))
    host = host_of({"t": TeacherConfig(path=str(tmp_path / "nan"))}, MemoryStore())
    assert len(score(host, "t", TRAJECTORIES[:3])) == 3  # the others do not suffer
    broken.lm_head.weight.data[5, 5] = torch.inf
    save_checkpoint(tmp_path / "inf", broken, chat)
    with pytest.raises(ValueError, match=r"teacher 't' .*inf.* output head that is not finite"):
        host_of({"t": TeacherConfig(path=str(tmp_path / "inf"))}, MemoryStore()).heads()


def test_trajectories_at_the_edges(paths: dict[str, str]) -> None:
    store = MemoryStore()
    host = host_of({"t": TeacherConfig(path=paths["one"])}, store)
    assert score(host, "t", []) == []
    silent = trajectory(0, 6)
    silent.loss_mask[:] = False
    one_token = trajectory(2, 6)
    one_token.loss_mask[:] = np.arange(6) == 1
    signals = score(host, "t", [silent, TRAJECTORIES[0], one_token])
    assert [store.get(signal.hidden).shape for signal in signals] == [(0, 32), (5, 32), (1, 32)]
    assert signals[0].probe_positions == signals[0].probe_lse == () and signals[2].probe_positions == (0,)
    first = trajectory(4, 6)
    first.loss_mask[0] = True
    with pytest.raises(ValueError, match=f"'{first.id}' has a loss token at index 0"):
        score(host, "t", [first])
    with pytest.raises(ValueError, match="teacher 'u' is not on this host; it holds t"):
        score(host, "u", [one_token])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts loads in full by folder name, and further readings under "read <name>"."""
    counted: Counter[str] = Counter()
    read = Shelf._read

    def load(model: ModelConfig) -> Any:
        counted[Path(model.path or "").name] += 1
        return load_model(model)

    def reading(shelf: Shelf, checkpoint: Checkpoint) -> Any:
        counted[f"read {Path(checkpoint.path).name}"] += 1
        return read(shelf, checkpoint)

    monkeypatch.setattr(teachers.shelf, "load_model", load)
    monkeypatch.setattr(Shelf, "_read", reading)
    return counted


def test_teachers_that_share_a_checkpoint_share_weights_and_head(paths: dict[str, str], loads: Counter[str]) -> None:
    store = MemoryStore()
    host = host_of({name: TeacherConfig(path=paths["one"]) for name in ("x", "y")}, store)
    heads = host.heads()
    assert heads["x"].weight == heads["y"].weight and (heads["x"].teacher, heads["y"].teacher) == ("x", "y")
    for name in ("x", "y"):
        score(host, name)
    assert loads == {"one": 1} and len(store.values) == 1 + 2 * len(TRAJECTORIES)


def test_residency_changes_when_weights_are_read_and_no_bit(paths: dict[str, str], loads: Counter[str]) -> None:
    states: dict[str, list[torch.Tensor]] = {}
    once = {"one": 1, "two": 1}
    for residency, expected in (
        ("device", once),
        ("host", once),
        ("disk", {**once, "read one": 2, "read two": 2}),
    ):
        loads.clear()
        store = MemoryStore()
        host = host_of({name: TeacherConfig(path=paths[name], residency=residency) for name in ("one", "two")}, store)
        host.heads()
        host.release()
        signals: list[TeacherHidden] = []
        for _step in range(2):
            for name, then in (("one", "two"), ("two", None)):
                signals += score(host, name, then=then)
                assert (host._shelf._ahead is not None) == (residency == "disk" and name == "one")
            host.release()
            assert (host._shelf.bytes_in_memory() == 0) == (residency == "disk")
        assert loads == expected
        states[residency] = [store.get(signal.hidden) for signal in signals]
        metrics = host.take_metrics()
        assert metrics["teacher/one/tokens"] == 2 * sum(given.num_loss_tokens for given in TRAJECTORIES)
        assert metrics["teacher/two/load_seconds"] > 0 and metrics["teacher/two/score_seconds"] > 0
        assert 0 < metrics["teacher/two/wait_seconds"] <= metrics["teacher/two/load_seconds"] + 1
        assert 0.5 < metrics["teacher/two/entropy_share"] < 1 and metrics["teacher/two/repeat_error"] < 1e-4
        assert host.take_metrics() == {}
    assert len(states["host"]) == 4 * len(TRAJECTORIES)
    for residency in ("device", "disk"):
        assert all(torch.equal(a, b) for a, b in zip(states["host"], states[residency], strict=True))


def group(domain: str, indices: list[int]) -> Group:
    prompt = Prompt(id=f"{domain}/train/0", domain=domain, effort="none", token_ids=(0,), reference={})
    return Group(prompt=prompt, trajectories=tuple(trajectory(index, LENGTHS[index], domain) for index in indices))


def test_pool_routes_a_mixed_step_and_keeps_its_order(paths: dict[str, str], loads: Counter[str]) -> None:
    teachers_ = {
        "z_first": TeacherConfig(path=paths["one"], domains={"a": 1.0, "b": 0.25}, residency="disk"),
        "both": TeacherConfig(path=paths["two"], domains={"b": 0.75}, residency="disk"),
        "wide": TeacherConfig(path=paths["qwen"], family="hf", default=True),
        "same": TeacherConfig(path=paths["one"], domains={"a": 0.0}, residency="disk"),
    }
    config = Config(teachers=teachers_)
    config.data.domains = {domain: DomainConfig() for domain in ("a", "b", "c")}
    placement = place(teachers_, 2)
    assert placement == {"z_first": 0, "both": 1, "wide": 1, "same": 0}
    store = MemoryStore()
    hosts = [
        InProcess(str(index), host_of({name: teachers_[name] for name in teachers_ if placement[name] == index}, store))
        for index in range(2)
    ]
    pool = TeacherPool(list(hosts), teacher_routes(config), placement)
    heads = pool.heads()
    assert list(heads) == ["both", "same", "wide", "z_first"] and heads["wide"].vocab_size == VOCAB
    for actor in hosts:
        actor.target.release()
        actor.asked.clear()
    loads.clear()

    groups = [group("b", [0, 1]), group("a", [2]), group("c", [3, 4]), group("a", [5, 1])]
    signals = pool.score(groups)
    expected = {"a": [("z_first", 1.0)], "b": [("both", 0.75), ("z_first", 0.25)], "c": [("wide", 1.0)]}
    assert [len(row) for row in signals] == [2, 1, 2, 2]
    for given, row in zip(groups, signals, strict=True):
        for one, several in zip(given.trajectories, row, strict=True):
            assert [(signal.teacher, signal.weight) for signal in several] == expected[one.domain]
            for signal in several:
                assert isinstance(signal, TeacherHidden)
                hidden = store.get(signal.hidden)
                alone = pool._hosts[placement[signal.teacher]].submit("score", signal.teacher, [one], 1.0).result()[0]
                assert torch.allclose(hidden, store.get(alone.hidden), atol=1e-5)  # of this trajectory, not another
                assert probe_error(hidden, signal, store.get(heads[signal.teacher].weight)) < 1e-5
    # one visit to each teacher, even with two weights, then the weights are let go
    assert hosts[0].asked[:3] == ["score z_first", "score z_first", "release"]
    assert hosts[1].asked[:3] == ["score both", "score wide", "release"]
    metrics = pool.metrics()
    assert (
        metrics["teacher/wide/tokens"] > 0
        and metrics["teacher/both/tokens"] > 0
        and "teacher/same/tokens" not in metrics
    )
    assert pool.score([]) == []


def test_pool_refuses_what_it_can_not_route(paths: dict[str, str]) -> None:
    host = InProcess("0", host_of({"t": TeacherConfig(path=paths["one"])}, MemoryStore()))
    pool = TeacherPool([host], {"a": (("t", 1.0),), "empty": ()}, {"t": 0})
    for domain in ("unheard_of", "empty"):
        with pytest.raises(
            ValueError, match=f"'{domain}/train/1#0@0' is of domain '{domain}', which no teacher serves"
        ):
            pool.score([group("a", [0]), group(domain, [1])])
    assert host.asked == []
    with pytest.raises(ValueError, match="routed to teacher 'u', which is on no host"):
        TeacherPool([host], {"a": (("u", 1.0),)}, {"t": 0})
    with pytest.raises(ValueError, match="teacher 't' is placed on host 1; there are 1"):
        TeacherPool([host], {"a": (("t", 1.0),)}, {"t": 1})


def test_place_spreads_checkpoints_and_keeps_sharers_together() -> None:
    teachers_ = {name: TeacherConfig(path=path) for name, path in zip("abcdef", "xyxzyw", strict=True)}
    assert place(teachers_, 2) == {"a": 0, "b": 1, "c": 0, "d": 0, "e": 1, "f": 1}
    assert place(teachers_, 9) == {"a": 0, "b": 1, "c": 0, "d": 2, "e": 1, "f": 3}
    assert place({}, 3) == {}
    three = {name: TeacherConfig(path=name) for name in "abc"}
    assert place(three, 2, {"a": 1.3, "b": 0.5, "c": 1.6}) == {"a": 1, "b": 1, "c": 0}
    assert place(three, 3, {"a": 1.0, "b": 0.0, "c": 0.0}) == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ValueError, match="num_hosts=0"):
        place(teachers_, 0)


def test_check_teachers_compares_before_anything_is_loaded(
    paths: dict[str, str], chat: Chat, tmp_path: Path, loads: Counter[str]
) -> None:
    good = {"one": TeacherConfig(path=paths["one"]), "wide": TeacherConfig(path=paths["qwen"], family="hf")}
    lines = check_teachers(chat, VOCAB, good)
    assert "vocabulary 297 of 300 padded" in lines[0]
    assert [line.partition(",")[0] for line in lines] == ["one: deepseek_v4", "wide: qwen3"]
    assert "hidden size 48" in lines[1] and not loads

    def refused(teacher: TeacherConfig, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            check_teachers(chat, VOCAB, {**good, "bad": teacher})
        assert f"teachers.bad.path={teacher.path}" in str(caught.value)

    refused(TeacherConfig(path=str(tmp_path / "missing")), "does not exist; expected a checkpoint folder")
    refused(
        TeacherConfig(path=paths["one"], family="hf"),
        "type 'deepseek_v4', but teachers.bad.family=hf; set it to deepse",
    )
    refused(TeacherConfig(path=paths["qwen"]), "type 'qwen3', but teachers.bad.family=deepseek_v4; set it to hf")

    save_checkpoint(tmp_path / "bare", v4(0), None)
    refused(TeacherConfig(path=str(tmp_path / "bare")), "tokenizer")
    other = copy.copy(Chat(train_tokenizer(["zebras quack exquisitely in the jazz quiz"], VOCAB)))
    other.save(tmp_path / "bare")
    refused(TeacherConfig(path=str(tmp_path / "bare")), "its tokenizer is not the student's: id [0-9]+ is ")
    assert check_teachers(chat, VOCAB, {"t": TeacherConfig(path=str(tmp_path / "bare"), tokenizer=paths["one"])})
    (tmp_path / "bare" / "config.json").write_text("{")
    refused(TeacherConfig(path=str(tmp_path / "bare")), "config.json is not readable as JSON")


SHIPPED = ("basic_arithmetic", "chain_sum", "leg_counting", "spell_backward")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_teacher_files_fit_the_schema(name: str) -> None:
    file = Path(__file__).parent.parent / "conf" / "teachers" / f"{name}.yaml"
    assert file.read_text().startswith(f"# @package teachers.{name}\n")
    config: Any = OmegaConf.structured(Config)
    config.run.name = "try"
    config = OmegaConf.merge(config, {"teachers": {name: OmegaConf.load(file)}})
    teacher = config.teachers[name]
    assert teacher.path == f"runs/try/specialists/{name}/hf"
    assert teacher.domains == {name: 1.0} and teacher.residency == "host"
