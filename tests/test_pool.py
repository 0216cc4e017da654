"""Teachers and a learner together: the loss does not know where weights lie, and no planted fault gets through."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.actors import Runtime
from opd.batching import plan
from opd.chat import Chat, train_tokenizer
from opd.config import (
    Config,
    DistillConfig,
    DomainConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    PoolConfig,
    RemoteConfig,
    TeacherConfig,
    teacher_routes,
)
from opd.divergence import compare
from opd.learner import Learner, LearnerSettings
from opd.model import load_model
from opd.types import Group, TeacherHead, TeacherHidden
from opd.weights import save_checkpoint
from teachers.pool import Scored, TeacherPool, hire_teachers, place
from teachers.remote import TeacherError
from teachers.store import HiddenStore, Spilled
from tests.test_teachers import VOCAB, InProcess, MemoryStore, group, host_of, v4

Signals = list[list[tuple[Scored, ...]]]
GROUPS = [group("a", [0, 1]), group("b", [2]), group("c", [3, 4]), group("b", [5, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, V4 teachers of its width and of another, and a dense one, with one tokenizer."""
    root = tmp_path_factory.mktemp("pool")
    chat = Chat(train_tokenizer(["how much is one and one, and how do you spell it"], VOCAB))
    for seed, (name, width) in enumerate({"student": 32, "one": 32, "two": 32, "wide": 64}.items()):
        save_checkpoint(root / name, v4(seed, width), chat)
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(root / "dense")
    chat.save(root / "dense")
    return root


def teachers_of(folder: Path, **settings: Any) -> dict[str, TeacherConfig]:
    served: dict[str, dict[str, float]] = {
        "one": {"a": 1.0, "b": 0.25}, "two": {"b": 0.5}, "wide": {"c": 0.75, "a": 0.5}, "dense": {"c": 0.5, "b": 0.25},
    }  # fmt: skip
    return {
        name: TeacherConfig(
            path=str(folder / name), family="hf" if name == "dense" else "deepseek_v4", domains=domains, **settings
        )
        for name, domains in served.items()
    }


def routes_of(teachers: dict[str, TeacherConfig]) -> dict[str, tuple[tuple[str, float], ...]]:
    config = Config(teachers=teachers)
    config.data.domains = {domain: DomainConfig() for domain in "abc"}
    return teacher_routes(config)


def pool_of(
    teachers: dict[str, TeacherConfig], store: HiddenStore, num_hosts: int = 2, **settings: Any
) -> tuple[TeacherPool, list[InProcess]]:
    placement = place(teachers, num_hosts)
    hosts = [
        InProcess(
            str(index),
            host_of({name: teachers[name] for name in teachers if placement[name] == index}, store, **settings),
        )
        for index in range(num_hosts)
    ]
    return TeacherPool(list(hosts), routes_of(teachers), placement), hosts


def learner_of(folder: Path, store: HiddenStore, rank: int = 0, num_ranks: int = 1, port: int = 0) -> Learner:
    learner = LearnerConfig(micro_batch_tokens=64, optimizer=OptimizerConfig(name="adamw"))
    model = ModelConfig(path=str(folder / "student"), fp4="none")
    stage = DistillConfig(learning_rate=1e-2, warmup_steps=0)
    settings = LearnerSettings(model=model, learner=learner, stage=stage, total_steps=4)
    settings = dataclasses.replace(settings, rank=rank, world_size=num_ranks, master_port=port)
    return Learner(settings, store)


def train(learner: Learner, signals: Signals, heads: dict[str, TeacherHead], groups: list[Group] = GROUPS) -> float:
    return learner.step(plan(groups, signals, num_ranks=1, micro_batch_tokens=64), heads).loss


def run(
    folder: Path, spill: Path, budget: int | None, num_hosts: int = 2, prefetch: bool = True, **settings: Any
) -> Any:
    """Losses of three steps, and the weights they end with."""
    store = HiddenStore(MemoryStore(), str(spill), budget)
    teachers = teachers_of(folder, **settings)
    pool, _ = pool_of(teachers, store, num_hosts, prefetch=prefetch)
    learner, heads, losses = learner_of(folder, store), pool.heads(), []
    for _ in range(3):
        signals = pool.score(GROUPS)
        losses.append(train(learner, signals, heads))
        for row in signals:
            for parts in row:
                for part in parts:
                    assert isinstance(part, TeacherHidden)
                    store.free(part.hidden)
    left = [path.name for path in spill.iterdir()] if spill.exists() else []
    assert len(left) == (len(heads) if settings["residency"] == "disk" else 0)  # of states none, and the heads
    return losses, {name: weight.clone() for name, weight in learner.model.state_dict().items()}


def test_losses_are_bitwise_the_same_wherever_weights_and_states_lie(folder: Path, tmp_path: Path) -> None:
    expected = run(folder, tmp_path / "resident", None, residency="device")
    assert len(set(expected[0])) == 3
    for number, (budget, hosts, prefetch, residency) in enumerate(
        [(None, 2, True, "host"), (0, 2, True, "disk"), (1500, 1, True, "disk"), (None, 1, False, "disk")]
    ):
        losses, weights = run(folder, tmp_path / str(number), budget, hosts, prefetch, residency=residency)
        assert losses == expected[0]
        assert all(torch.equal(weight, expected[1][name]) for name, weight in weights.items())


def one_rank(rank: int, num_ranks: int, port: int, folder: Path, out: Path) -> None:
    """Losses of three steps of a rank, and the weights they end with, by where teachers lie."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for residency, budget in (("device", None), ("host", 1500), ("disk", 0)):
        store = HiddenStore(MemoryStore(), str(out / f"{residency}_{rank}_of_{num_ranks}"), budget)
        pool, _ = pool_of(teachers_of(folder, residency=residency), store)
        learner, heads = learner_of(folder, store, rank, num_ranks, port), pool.heads()
        losses = []
        for _ in range(3):
            work = plan(GROUPS, pool.score(GROUPS), num_ranks=num_ranks, micro_batch_tokens=64)
            losses.append(learner.step(work, heads).loss)
        found[residency] = losses, {name: weight.tolist() for name, weight in learner.model.state_dict().items()}
        learner.close()
    (out / f"rank_{rank}_of_{num_ranks}.json").write_text(json.dumps(found))


def test_one_rank_and_two_learn_the_same_wherever_weights_and_states_lie(folder: Path, tmp_path: Path) -> None:
    """Between residencies bit for bit, between numbers of ranks to rounding."""
    context = multiprocessing.get_context("spawn")
    for num_ranks in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            context.Process(target=one_rank, args=(r, num_ranks, port, folder, tmp_path)) for r in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=300)
            process.kill()  # no effect on one that has ended
        assert [process.exitcode for process in ranks] == [0] * num_ranks

    def told(rank: int, num_ranks: int) -> dict[str, Any]:
        return json.loads((tmp_path / f"rank_{rank}_of_{num_ranks}.json").read_text())

    alone, pair = told(0, 1), [told(0, 2), told(1, 2)]
    for found in (alone, *pair):
        assert found["device"] == found["host"] == found["disk"]
    assert pair[0]["disk"][1] == pair[1]["disk"][1]
    for expected, *parts in zip(alone["disk"][0], pair[0]["disk"][0], pair[1]["disk"][0], strict=True):
        assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(expected, rel=1e-5)


def test_any_order_of_teachers_gives_the_same_loss_to_rounding(folder: Path) -> None:
    losses = []
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        plain = teachers_of(folder)
        order = [list(plain)[index] for index in torch.randperm(len(plain), generator=generator).tolist()]
        store = HiddenStore(MemoryStore())
        pool, _ = pool_of({f"{number}_{name}": plain[name] for number, name in enumerate(order)}, store)
        losses.append(train(learner_of(folder, store), pool.score(GROUPS), pool.heads()))
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


def test_families_and_widths_mix_in_one_step(folder: Path) -> None:
    """The step's loss against dense float64 logits of each model by itself."""
    store = HiddenStore(MemoryStore())
    teachers = teachers_of(folder)
    pool, _ = pool_of(teachers, store)
    heads = pool.heads()
    assert {name: tuple(store.get(head.weight).shape) for name, head in heads.items()} == {
        "one": (VOCAB, 32), "two": (VOCAB, 32), "wide": (VOCAB, 64), "dense": (VOCAB, 48),
    }  # fmt: skip
    found = train(learner_of(folder, store), pool.score(GROUPS), heads)

    def logprobs(name: str, ids: torch.Tensor) -> torch.Tensor:
        family = "hf" if name == "dense" else "deepseek_v4"
        model: Any = load_model(ModelConfig(family=family, path=str(folder / name), fp4="none")).double()
        with torch.no_grad():
            return (model(ids[None], torch.tensor([len(ids)])).hidden[0] @ model.head.T).log_softmax(-1)

    total, count = 0.0, 0
    for one in (trajectory for given in GROUPS for trajectory in given.trajectories):
        ids = torch.from_numpy(one.token_ids).long()
        at = torch.from_numpy(one.loss_mask.nonzero()[0]) - 1
        p = logprobs("student", ids)[at]
        for name, weight in routes_of(teachers)[one.domain]:
            total += weight * (p.exp() * (p - logprobs(name, ids)[at])).sum().item()
        count += one.num_loss_tokens
    assert found == pytest.approx(total / count, rel=1e-4)


def test_a_soft_mixture_pulls_towards_the_geometric_mean() -> None:
    """sum_i w_i KL(p || q_i) = w KL(p || q) - w log Z with q the weighted geometric mean; w = sum_i w_i (float64)."""
    torch.manual_seed(0)
    num, vocab, weights = 11, 37, (0.25, 1.5, 0.75)
    hidden = torch.randn(num, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocab, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(num, dtype=torch.int64)
    states = [torch.randn(num, width, dtype=torch.float64) for width in (4, 8, 13)]
    heads = [torch.randn(vocab, width, dtype=torch.float64) for width in (4, 8, 13)]

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, (hidden, head))
        return torch.cat([gradient.flatten() for gradient in found])

    mixture = torch.stack(
        [w * compare(hidden, head, s, h, targets).reverse_kl for w, s, h in zip(weights, states, heads, strict=True)]
    ).sum(0)
    whole = sum(weights)
    logits = [s @ h.T for s, h in zip(states, heads, strict=True)]
    mean = sum((w / whole * u.log_softmax(-1) for w, u in zip(weights, logits, strict=True)), torch.zeros(num, vocab))
    log_z = mean.logsumexp(-1)
    geometric = whole * compare(hidden, head, mean, torch.eye(vocab, dtype=torch.float64), targets).reverse_kl
    assert (mixture - (geometric - whole * log_z)).abs().max() < 1e-12 * mixture.abs().max()
    assert (log_z < 0).all()
    one, other = gradients(mixture.sum()), gradients(geometric.sum())
    assert (one - other).norm() < 1e-12 * one.norm()
    summed = sum((w / whole * u for w, u in zip(weights, logits, strict=True)), torch.zeros(num, vocab))
    third = gradients(whole * compare(hidden, head, summed, torch.eye(vocab).double(), targets).reverse_kl.sum())
    assert (one - third).norm() < 1e-12 * one.norm()


# --- planted faults ---------------------------------------------------------------------------------------------------


def forge(signals: Signals, change: Callable[[TeacherHidden], TeacherHidden]) -> Signals:
    def changed(part: Scored) -> Scored:
        return change(part) if isinstance(part, TeacherHidden) and part.teacher == "one" else part

    return [[tuple(map(changed, parts)) for parts in row] for row in signals]


@pytest.mark.parametrize(
    "fault",
    ["wrong head", "swapped head bytes", "stale state", "another's state", "no final norm", "torn file", "gone"],
)
def test_no_state_or_head_that_does_not_belong_is_trained_on(fault: str, folder: Path, tmp_path: Path) -> None:
    """And the rollouts are not lost: scored again by teachers that start anew, they give the loss they would have."""
    store = HiddenStore(MemoryStore(), str(tmp_path / "spill"), 0)
    pool, _ = pool_of(teachers_of(folder, residency="disk"), store)
    heads, signals = pool.heads(), pool.score(GROUPS)
    expected = train(learner_of(folder, store), signals, heads)
    learner = learner_of(folder, store)
    before = {name: weight.clone() for name, weight in learner.model.state_dict().items()}
    bad_heads, bad_signals, message = heads, signals, ""
    spilled = next(p.hidden for row in signals for parts in row for p in parts if p.teacher == "one")  # type: ignore[union-attr]
    assert isinstance(spilled, Spilled)
    match fault:
        case "wrong head":
            bad_heads, message = {**heads, "one": heads["two"]}, "teacher one: .* belong to the output head"
        case "swapped head bytes":
            other = heads["two"].weight
            assert isinstance(heads["one"].weight, Spilled) and isinstance(other, Spilled)
            Path(heads["one"].weight.path).write_bytes(Path(other.path).read_bytes())
            message = "holds 'head of two', it was written for 'head of one'"
        case "stale state":  # of the same teacher on the same trajectory, by weights of before: its key is right
            stale = store.put(store.get(spilled) + 0.05, spilled.key)
            os.replace(stale.path, spilled.path)
            message = "teacher one: hidden states of trajectory .* times its output head"
        case "another's state":
            rows = [p.hidden for row in signals for parts in row for p in parts if p.teacher == "two"]  # type: ignore[union-attr]
            Path(spilled.path).write_bytes(Path(rows[0].path).read_bytes())
            message = "holds 'two on .*, it was written for 'one on a/train/0#0@0'"
        case "no final norm":
            norm = load_model(ModelConfig(path=str(folder / "one"), fp4="none")).model.norm.weight  # type: ignore[union-attr]

            def unnormed(part: TeacherHidden) -> TeacherHidden:
                return dataclasses.replace(part, hidden=store.put((store.get(part.hidden) / norm).detach(), "x"))

            bad_signals, message = forge(signals, unnormed), "teacher one: .* before the final norm"
        case "torn file":
            os.truncate(spilled.path, 40)
            message = r"one on a/train/0#0@0 is not to be read from"
        case _:
            os.unlink(spilled.path)
            message = r"one on a/train/0#0@0 is not to be read from"
    with pytest.raises(ValueError, match=message):
        train(learner, bad_signals, bad_heads)
    assert all(torch.equal(weight, before[name]) for name, weight in learner.model.state_dict().items())
    anew, _ = pool_of(teachers_of(folder, residency="disk"), store)
    heads = anew.heads()
    assert train(learner, anew.score(GROUPS), heads) == expected


def test_a_teacher_that_breaks_in_the_middle_of_a_run_costs_no_rollout(folder: Path) -> None:
    """Not finite from now on: named with the trajectory; what the others said is kept, and nothing is trained on."""
    store = HiddenStore(MemoryStore())
    pool, hosts = pool_of(teachers_of(folder), store)
    heads = pool.heads()
    expected = train(learner_of(folder, store), pool.score(GROUPS), heads)
    host = next(host for host in hosts if "two" in host.target._teachers)
    entries = next(
        entries for checkpoint, entries in host.target._shelf._kept.items() if checkpoint.path.endswith("two")
    )
    norm = entries["model.norm.weight"]
    assert isinstance(norm, torch.Tensor)
    whole = norm.clone()
    norm[3] = torch.nan
    for each in hosts:
        each.asked.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"teacher 'two' \(.*/two\) gives .* not finite on trajectory 'b/train/\d"):
            pool.score(GROUPS)
    norm.copy_(whole)
    found = train(learner_of(folder, store), pool.score(GROUPS), heads)
    assert found == expected
    asked = [what for each in hosts for what in each.asked]
    assert asked.count("score two") == 3 and asked.count("score wide") == 2  # with its weight in a, and in c


def test_a_swapped_teacher_file_costs_no_rollout(folder: Path, tmp_path: Path) -> None:
    teachers = teachers_of(folder, residency="disk")
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, load_model(ModelConfig(path=str(folder / name), fp4="none")), None)
        teachers[name].path = str(tmp_path / name)
    store = HiddenStore(MemoryStore())
    pool, hosts = pool_of(teachers, store)
    pool.heads()
    expected = pool.score(GROUPS)
    mine, aside = tmp_path / "one" / "model.safetensors", tmp_path / "aside"
    os.link(mine, aside)
    (tmp_path / "fresh").write_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    os.replace(tmp_path / "fresh", mine)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"teachers\.one\.path=.* were replaced or written to since"):
            pool.score(GROUPS)
    for host in hosts:
        host.target._shelf._known.clear()  # as a host that is started anew: by now "one" is what lies there
    os.replace(aside, mine)
    found = pool.score(GROUPS)
    for row, other in zip(expected, found, strict=True):
        for parts, others in zip(row, other, strict=True):
            for one, two in zip(parts, others, strict=True):
                assert isinstance(one, TeacherHidden) and isinstance(two, TeacherHidden)
                assert one.teacher == two.teacher and torch.equal(store.get(one.hidden), store.get(two.hidden))


def test_rows_that_pad_a_vocabulary_are_cut_from_head_and_probes(folder: Path, tmp_path: Path) -> None:
    padded: Any = load_model(ModelConfig(path=str(folder / "one"), fp4="none"))
    padded.lm_head.weight.data[-20:] = 50.0  # what nobody trained may be anything
    save_checkpoint(tmp_path / "padded", padded, None)
    signals: dict[str, TeacherHidden] = {}
    heads: dict[str, torch.Tensor] = {}
    store = MemoryStore()
    for name, path in (("plain", folder / "one"), ("padded", tmp_path / "padded")):
        host = host_of({name: TeacherConfig(path=str(path))}, store, vocab_size=VOCAB - 20)
        heads[name] = store.get(host.heads()[name].weight)
        (signal,) = host.score(name, [GROUPS[0].trajectories[0]], 1.0)
        assert isinstance(signal, TeacherHidden)
        signals[name] = signal
    assert len(heads["padded"]) == VOCAB - 20 and torch.equal(heads["plain"], heads["padded"])
    assert signals["plain"].head_hash == signals["padded"].head_hash
    assert signals["plain"].probe_lse == signals["padded"].probe_lse
    with pytest.raises(ValueError, match=r"teacher 'short' .* has an output head of 300 rows; the tokenizer has 301"):
        host_of({"short": TeacherConfig(path=str(folder / "one"))}, store, vocab_size=VOCAB + 1).heads()


@pytest.mark.ray
def test_scores_and_failures_are_the_same_from_other_processes(
    folder: Path, tmp_path: Path, ray_cluster: Runtime
) -> None:
    config = Config(teachers=teachers_of(folder, residency="disk"))
    config.data.domains = {domain: DomainConfig() for domain in "abc"}
    config.model.fp4 = "none"
    config.stages.distill.hidden_dtype = "float32"
    config.learner.micro_batch_tokens = 64
    config.pool.hidden_bytes = 2000
    config.pool.patience_seconds = 0.2
    here = HiddenStore(MemoryStore())
    expected = pool_of(config.teachers, here)[0].score(GROUPS)
    remote = RemoteConfig(max_retries=0)
    far = TeacherConfig(path="http://127.0.0.1:1/v1", family="remote", tokenizer="x", domains={"a": 0.1}, remote=remote)
    for teachers in (config.teachers, {**config.teachers, "far": far}):
        config.teachers = teachers
        hosts, pool = hire_teachers(
            config, ray_cluster, str(tmp_path), device="cpu", vocab_size=VOCAB, timeout_seconds=120.0
        )
        try:
            assert list(pool.heads()) == ["dense", "one", "two", "wide"]
            if "far" in teachers:
                with pytest.raises(TeacherError, match="teacher 'far' could not score"):
                    pool.score(GROUPS)
                continue
            there = HiddenStore(ray_cluster.store, str(tmp_path))
            found = pool.score(GROUPS)
            kinds = set()
            for row, other in zip(expected, found, strict=True):
                for parts, others in zip(row, other, strict=True):
                    for one, two in zip(parts, others, strict=True):
                        assert isinstance(one, TeacherHidden) and isinstance(two, TeacherHidden)
                        assert (one.teacher, one.weight, one.head_hash) == (two.teacher, two.weight, two.head_hash)
                        assert torch.equal(here.get(one.hidden), there.get(two.hidden))
                        kinds.add(isinstance(two.hidden, Spilled))
            assert kinds == {False, True}
        finally:
            ray_cluster.dismiss(hosts)


# --- hiring -----------------------------------------------------------------------------------------------------------


def test_hosts_are_hired_as_configured(folder: Path, tmp_path: Path) -> None:
    hired: list[tuple[str, float, dict[str, Any], tuple[Any, ...]]] = []

    class Recorder:
        store = MemoryStore()

        def spawn(self, cls: type, *args: Any, name: str, num_gpus: float, **settings: Any) -> InProcess:
            hired.append((name, num_gpus, settings, args))
            return InProcess(name, cls(*args, **settings))

    config = Config(teachers=teachers_of(folder, residency="disk"))
    config.data.domains = {domain: DomainConfig() for domain in "abc"}
    far = TeacherConfig(path="http://127.0.0.1:1/v1", family="remote", tokenizer="x", domains={"a": 0.1})
    config.teachers["far"] = far
    config.model.fp4 = "none"
    config.runtime.num_teacher_hosts, config.runtime.gpus_per_teacher = 2, 1.0
    config.pool = PoolConfig(weight_bytes=10**8, hidden_bytes=3000, prefetch=False)
    spill = tmp_path / "spill"
    spill.mkdir()
    (spill / "leftover.safetensors").write_bytes(b"")
    runtime: Any = Recorder()
    hosts, pool = hire_teachers(config, runtime, str(spill), device="cpu", vocab_size=VOCAB, timeout_seconds=9.0)
    assert not list(spill.iterdir())
    assert [host.name for host in hosts] == [f"teacher host {index}" for index in range(3)]
    assert [gpus for _, gpus, _, _ in hired] == [1.0, 1.0, 0.0]  # a remote teacher computes nothing here
    assert list(hired[2][3][0]) == ["far"]
    settings = hired[0][2]
    assert settings["prefetch"] is False and settings["weight_bytes"] == 10**8 and settings["vocab_size"] == VOCAB
    assert list(pool.heads()) == ["dense", "one", "two", "wide"]
    kept = sum(not isinstance(hosts[0].target._store.put(torch.zeros(100)), Spilled) for _ in range(9))  # type: ignore[attr-defined]
    assert kept == 2  # of 400 bytes: a third of the budget is this host's
