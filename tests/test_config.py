"""The configuration: what composes, what is refused and how the refusal reads, and that no key is ever ignored."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.__main__ import COMMANDS, compose
from opd.config import Config, ConfigError, DomainConfig, TeacherConfig, check_config, teacher_routes

ROOT = Path(__file__).parent.parent
TWO = ("data=[spell_backward,leg_counting]", "teachers=[spell_backward,leg_counting]")
GROUPS = ("model", "data", "rollout", "teachers", "learner", "experiment", "runtime")


@functools.cache
def _composed() -> Config:
    return compose("distill", ["runtime=local", "model.max_tokens=64", *TWO])[0]


def config(**changes: Any) -> Config:
    """A valid configuration of this process's own with some keys changed; "__" stands for the dot of a key."""
    made = copy.deepcopy(_composed())
    for key, value in changes.items():
        owner, _, name = key.replace("__", ".").rpartition(".")
        target = operator.attrgetter(owner)(made) if owner else made
        assert hasattr(target, name), key
        setattr(target, name, value)
    return made


def rows(**settings: Any) -> DomainConfig:
    return DomainConfig(source="rows", **{"path": "rows.jsonl", **settings})


def gym(**settings: Any) -> DomainConfig:
    return DomainConfig(**{"task": "chain_sum", **settings})


# --- what check_config refuses ----------------------------------------------------------------------------------------


def test_defaults_are_accepted() -> None:
    check_config(config())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("run.name", "a b", "letters, digits"),
        ("run.name", "../a", "letters, digits"),
        ("run.name", "/a", "letters, digits"),
        ("run.name", "", "letters, digits"),
        ("model.family", "v4", "deepseek_v4, hf"),
        ("model.fp4", "all", "experts, linears, none"),
        ("model.max_tokens", 1, "at least 2"),
        ("tokenizer.vocab_size", 299, "at least 300"),
        ("tokenizer.samples_per_domain", 0, "at least 1"),
        ("domain", "physics", "spell_backward, leg_counting"),
        ("rollout.num_workers", 0, "at least 1"),
        ("rollout.num_slots", 0, "at least 1"),
        ("rollout.sampling.top_p", 0.0, r"\(0, 1\]"),
        ("rollout.sampling.top_p", 1.1, r"\(0, 1\]"),
        ("rollout.sampling.top_k", -1, "at least 0"),
        ("rollout.sampling.max_new_tokens", 0, "at least 1"),
        ("rollout.sampling.max_new_tokens", 64, "model.max_tokens=64"),
        ("checkpoint.keep_last", 0, "at least 1"),
        ("checkpoint.keep_best", -1, "at least 0"),
        ("checkpoint.keep_best", 2, "no stage evaluates"),
        ("checkpoint.best_metric", "eval/mean_length", "eval/pass_at_1/<domain>"),
        ("checkpoint.best_metric", "eval/pass_at_1/physics", "spell_backward, leg_counting"),
        ("checkpoint.best_metric", "eval/pass_at_1/leg_counting", "checkpoint.keep_best is 0"),
        ("stages.grpo.max_staleness", -1, "at least 0"),
        ("stages.distill.max_staleness", 1, "runtime=ray or max_staleness=0"),
        ("runtime.max_restarts", -1, "at least 0"),
        ("learner.num_ranks", 0, "at least 1"),
        ("learner.num_ranks", 2, "runtime=ray or num_ranks=1"),
        ("learner.zero_stage", 4, "0, 1, 2, 3"),
        ("learner.zero_stage", 3, "zero_stage 0, 1 or 2, or optimizer.name=adamw"),
        ("learner.micro_batch_tokens", 63, "at least 64"),
        ("learner.grad_clip", -1.0, "at least 0"),
        ("learner.kl_tile_tokens", 0, "at least 1"),
        ("learner.kl_tile_vocab", 0, "at least 1"),
        ("learner.balance_loss", -1e-4, "at least 0"),
        ("learner.balance_bias_speed", float("nan"), "at least 0"),
        ("learner.optimizer.name", "sgd", "muon, adamw"),
        ("learner.optimizer.weight_decay", -0.1, "at least 0"),
        ("learner.optimizer.momentum", 1.0, r"\[0, 1\)"),
        ("learner.optimizer.betas", (0.9, 1.0), r"\[0, 1\)"),
        ("learner.optimizer.betas", (0.9,), "two entries"),
        ("learner.optimizer.eps", 0.0, "above 0"),
        ("runtime.kind", "slurm", "ray, local"),
        ("runtime.device", "tpu", "auto, cpu, cuda"),
        ("runtime.address", "10.0.0.1:6379", "joins no cluster; leave it at null"),
        ("runtime.actor_threads", 0, "at least 1"),
        ("runtime.num_teacher_hosts", 0, "at least 1"),
        ("runtime.num_cpus", 0, "at least 1"),
        ("runtime.object_store_gb", 0.01, "at least 0.08"),
        ("runtime.cpus_per_actor", -0.5, "at least 0"),
        ("runtime.gpus_per_worker", -1.0, "at least 0"),
        ("runtime.gpus_per_teacher", -1.0, "at least 0"),
        ("runtime.gpus_per_rank", -1.0, "at least 0"),
        ("runtime.timeout_seconds", 0.0, "above 0"),
        ("stages.base.steps", -1, "at least 0"),
        ("stages.sft.prompts_per_step", 0, "at least 1"),
        ("stages.sft.group_size", 4, "demonstrations are not sampled; leave it at 1"),
        ("stages.base.temperature", 0.7, "demonstrations are not sampled; leave it at 1.0"),
        ("stages.sft.mtp_weight", -0.1, "at least 0"),
        ("stages.grpo.mtp_weight", 0.3, "learns from demonstrations only; leave it at 0.0"),
        ("stages.distill.mtp_weight", 0.1, "learns from demonstrations only; leave it at 0.0"),
        ("stages.grpo.learning_rate", float("nan"), "at least 0"),
        ("stages.grpo.group_size", 1, "at least 2"),
        ("stages.grpo.temperature", 0.0, "above 0"),
        ("stages.grpo.clip", 0.0, "above 0"),
        ("stages.grpo.kl_coefficient", -0.1, "at least 0"),
        ("stages.distill.group_size", 0, "at least 1"),
        ("stages.distill.temperature", -1.0, "at least 0"),
        ("stages.distill.warmup_steps", -1, "at least 0"),
        ("stages.distill.decay_fraction", 1.5, r"\[0, 1\]"),
        ("stages.distill.eval_every", -1, "at least 0"),
        ("stages.distill.checkpoint_every", -1, "at least 0"),
        ("stages.distill.kl_temperature", 0.0, "above 0"),
        ("stages.distill.kl_temperature", float("inf"), r"kl_temperature=inf is not in \[0\.001, 1000\]"),
        ("stages.distill.hidden_dtype", "float16", "bfloat16, float32"),
        ("stages.distill.loss", "kl", "reverse_kl, forward_kl, mixed_kl, .*topk_reverse_kl, .*sampled_reverse_kl, "),
        ("stages.distill.mix", 0.7, "loss=reverse_kl has none; leave it at 0.5"),
        ("stages.distill.beta", 0.1, "loss=reverse_kl has none; leave it at 0.5"),
        ("stages.distill.top_k", 8, "loss=reverse_kl has none; leave it at 64"),
        ("stages.distill.advantage_clip", 1.0, "loss=reverse_kl has none; leave it at null"),
        ("stages.distill.baseline", "kl", "loss=reverse_kl has none; leave it at none"),
        ("stages.distill.reference_kl", -0.1, "at least 0"),
        ("stages.distill.correction.ratio", "tis", "no expectation over the sampled token"),
        ("stages.distill.correction.ratio", "ppo", "none, tis, mis, icepop, sequence_tis, sequence_mis"),
        ("stages.distill.correction.high", 3.0, "ratio=none has no bounds; leave it at 2.0"),
        ("stages.distill.correction.low", 0.1, "only ratio=icepop has a lower bound; leave it at 0.5"),
        ("stages.distill.correction.max_mean_gap", -0.1, "at least 0"),
        ("stages.distill.correction.opsm_delta", 0.1, "only GRPO's advantages have a sign"),
        ("stages.grpo.correction.ratio", "icepop", "surrogate holds the ratio itself; leave it at none"),
        ("stages.grpo.correction.opsm_delta", -0.1, "at least 0"),
        ("stages.grpo.correction.veto", float("nan"), "at least 0"),
        ("eval.samples", -1, "at least 0"),
        ("eval.temperature", 0.0, "above 0"),
        ("eval.temperature", float("inf"), r"eval\.temperature=inf is not in \[0\.001, 1000\]"),
        ("stages.distill.temperature", 1e-39, r"distill\.temperature=1e-39 is not in \[0\.001, 1000\]"),
        ("eval.inline_prompts", 0, "at least 1"),
        ("tracking.wandb", "yes", "offline, online, disabled"),
    ],
)
def test_a_refusal_names_key_value_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    broken = config(**{key.replace(".", "__"): value})
    with pytest.raises(ConfigError) as refused:
        check_config(broken)
    message = str(refused.value)
    assert message.startswith(key), message
    shown = list(value) if isinstance(value, tuple) else value
    assert str(shown) in message or str(value[-1]) in message, message
    assert re.search(allowed, message), message


def test_deadlines_of_unknown_phases_and_of_nothing() -> None:
    with pytest.raises(ConfigError, match="runtime.deadlines: the phase=publish .* rollout, score, train, checkpoint"):
        check_config(config(runtime__deadlines={"publish": 9.0}))
    with pytest.raises(ConfigError, match="runtime.deadlines.score=0.0 is too small; it must be above 0"):
        check_config(config(runtime__deadlines={"train": 9.0, "score": 0.0}))


def test_a_run_is_resumed_or_overwritten() -> None:
    with pytest.raises(ConfigError, match="resume=auto goes on with a run and run.overwrite=true replaces it"):
        check_config(config(resume="auto", run__overwrite=True))


@pytest.mark.parametrize(
    ("domain", "key", "allowed"),
    [
        (gym(source="web"), "source=web", "reasoning_gym, rows"),
        (gym(verifier="judge"), "verifier=judge", "null, task, exact, number, choice"),
        (gym(answer_format="xml"), "answer_format=xml", "plain, tags, boxed"),
        (gym(effort="low"), "effort=low", "none, high, max"),
        (gym(num_eval=0), "num_eval=0", "at least 1"),
        (gym(num_train=0), "num_train=0", "at least 1"),
        (gym(weight=-1.0), "weight=-1.0", "at least 0"),
        (gym(eval_fraction=1.0), "eval_fraction=1.0", r"\[0, 1\)"),
        (gym(task=None), "task is null", "name of a task"),
        (gym(path="rows.jsonl"), "path=rows.jsonl", "source=reasoning_gym"),
        (gym(eval_path="rows.jsonl"), "eval_path=rows.jsonl", "source=reasoning_gym"),
        (gym(columns={"prompt": "q"}), "columns={'prompt': 'q'}", "source=reasoning_gym"),
        (gym(where="a"), "where=a", "source=reasoning_gym"),
        (rows(path=None), "path is null", "a file or a hub id"),
        (rows(verifier="task"), "verifier=task", "exact, number or choice"),
        (rows(task="chain_sum"), "task=chain_sum", "source=rows"),
        (rows(params={"max_terms": 2}), "params={'max_terms': 2}", "source=rows"),
    ],
)
def test_a_domain_is_refused_by_its_own_key(domain: DomainConfig, key: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed) as refused:
        check_config(config(data__domains={"algebra": domain}))
    assert str(refused.value).startswith(f"data.domains.algebra.{key}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__domains": {}}, r"data\.domains is empty.*data=\[chain_sum\]"),
        ({"data__domains": {"a/b": gym()}}, r"data\.domains\.a/b.*letters, digits"),
        ({"data__domains": {"..": gym()}}, r"letters, digits"),
        ({"teachers": {"a b": TeacherConfig(path="x")}}, r"teachers\.a b.*letters, digits"),
        ({"teachers": {"a": TeacherConfig(path="x", family="gpt")}}, r"teachers\.a\.family=gpt.*deepseek_v4, hf"),
        ({"teachers": {"a": TeacherConfig(path="x", residency="gpu")}}, r"teachers\.a\.residency=gpu.*host, disk"),
        ({"model__family": "hf"}, r"model\.path is null.*model\.family=hf"),
        ({"model__family": "hf", "model__path": "x"}, r"model\.fp4=experts.*must be linears or none"),
        ({"model__fp4": "linears"}, r"model\.fp4=linears.*must be experts or none"),
        ({"rollout__sampling__top_k": 5}, r"top_k=5 must be off .*stages\.grpo\.steps > 0"),
        ({"rollout__sampling__top_p": 0.9}, r"top_p=0\.9, .*must be off .*stages\.grpo\.steps > 0"),
    ],
)
def test_settings_that_cannot_work_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**changes))


def test_what_does_not_run_is_not_checked_against_the_rest() -> None:
    check_config(config(stages__grpo__steps=0, rollout__sampling__top_k=5))
    check_config(config(stages__grpo__steps=0, stages__grpo__group_size=1))
    check_config(config(model__family="hf", model__path="x", model__fp4="none", model__fp4_index=False))
    check_config(config(model__family="hf", model__path="x", model__fp4="linears", model__fp4_index=False))
    check_config(config(runtime__kind="ray", learner__num_ranks=2))
    check_config(config(learner__zero_stage=2, learner__optimizer__name="adamw"))
    check_config(config(stages__distill__temperature=0.0))


# --- routes -----------------------------------------------------------------------------------------------------------


def teacher(**settings: Any) -> TeacherConfig:
    return TeacherConfig(path="x", **settings)


def routes(teachers: dict[str, TeacherConfig], domains: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Any]:
    return teacher_routes(config(data__domains={name: gym() for name in domains}, teachers=teachers))


def test_a_teacher_serves_the_domain_of_its_name_or_those_it_lists() -> None:
    assert routes({name: teacher() for name in "abc"}) == {name: ((name, 1.0),) for name in "abc"}
    assert routes({"x": teacher(domains={"a": 0.25, "c": 1.0}), "b": teacher(), "a": teacher()}) == {
        "a": (("x", 0.25), ("a", 1.0)),
        "b": (("b", 1.0),),
        "c": (("x", 1.0),),
    }


def test_the_default_teacher_serves_what_nobody_else_does() -> None:
    assert routes({"a": teacher(), "rest": teacher(default=True)}) == {
        "a": (("a", 1.0),),
        "b": (("rest", 1.0),),
        "c": (("rest", 1.0),),
    }
    assert routes({"a": teacher(default=True), "b": teacher(domains={"b": 0.0})})["b"] == (("a", 1.0),)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"a": teacher(), "b": teacher()}, r"data\.domains\.c has no teacher; teachers: a, b\. .*teachers/c\.yaml"),
        ({}, r"data\.domains\.a has no teacher; teachers: none"),
        ({"d": teacher()}, r"teachers\.d\.domains names the unknown domain 'd'; data\.domains has: a, b, c"),
        ({"a": teacher(domains={"e": 1.0})}, r"teachers\.a\.domains names the unknown domain 'e'"),
        ({"a": teacher(domains={"a": -1.0})}, r"teachers\.a\.domains\.a=-1\.0 is too small; .*at least 0"),
        ({"a": teacher(default=True), "b": teacher(default=True)}, r"teachers\.\*\.default is true for a, b; at most"),
    ],
)
def test_routes_that_cannot_work(teachers: dict[str, TeacherConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        routes(teachers)


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.famly=hf"], r"Key 'famly' not in 'ModelConfig'"),
        (["+model.famly=hf"], r"model\.famly is not a key; model has: family, path"),
        (["++model.famly=hf"], r"model\.famly is not a key"),
        (["+speed=1"], r"speed is not a key; the configuration has: seed, domain, resume, run"),
        (["+data.domains.spell_backward.weigth=2", *TWO], r"spell_backward\.weigth is not a key; .* weight"),
        (["teachers.spell_backward.pth=x", *TWO], r"Key 'pth' not in 'TeacherConfig'"),
        (["teachers.spell_backward.domains=[1]", *TWO], r"teachers\.spell_backward\.domains"),
        (["data=[spell_backward,physics]"], r"data=physics selects no file; data has: .*gsm8k_rows, .*spell_backward"),
        (["data=physics"], r"data=physics selects no file; data has: .*gsm8k_rows, .*spell_backward"),
        (["model=gpt"], r"model=gpt selects no file; model has: hf, v4_base, .*v4_tiny"),
        (["experiment=fast"], r"experiment=fast selects no file; experiment has: quickstart"),
        (["modle=hf"], r"modle"),
        (["stages.base.steps=many"], r"stages\.base\.steps.* 'many' .*Integer"),
        (["stages.base.steps=1.5"], r"stages\.base\.steps.* '1\.5' .*Integer"),
        (["model.config=3"], r"model\.config"),
        (["stages.base.learning_rate=[1]"], r"stages\.base\.learning_rate"),
        (["learner.optimizer.betas=[0.9]"], r"learner\.optimizer\.betas=\[0\.9\] must have two entries"),
        (["run.name=???"], r"missing mandatory value.*run\.name"),
        (["run.name=${nowhere}"], r"'nowhere' not found"),
        (["model=hf"], r"model\.path is null"),
        (["experiment=null"], r"group override must be a string or a list"),
        (["data=[]"], r"data\.domains is empty"),
        (["stages.base.steps"], r"stages\.base\.steps"),
        (["data=[chain_sum"], r"\[chain_sum"),
        (["stages.base.steps=-1"], r"stages\.base\.steps=-1 is too small"),
    ],
)
def test_what_does_not_compose(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        compose("base", overrides)
    assert "\n" not in str(refused.value)


def test_lists_choose_domains_and_teachers_in_their_order() -> None:
    chosen, plain = compose("base", ["data=[leg_counting,spell_backward]", "teachers=[leg_counting]", "run.name=mine"])
    assert list(chosen.data.domains) == ["leg_counting", "spell_backward"]
    assert list(chosen.teachers) == ["leg_counting"]
    assert chosen.teachers["leg_counting"].path == "runs/mine/specialists/leg_counting/hf"
    assert dataclasses.asdict(chosen).keys() == plain.keys()
    assert plain["teachers"]["leg_counting"]["path"] == chosen.teachers["leg_counting"].path
    assert list(compose("base", ["data=leg_counting"])[0].data.domains) == ["leg_counting"]


def test_experiment_is_over_the_groups_and_runtime_over_the_experiment_whatever_the_order_of_overrides() -> None:
    plain = compose("distill", ["~experiment"])[0]
    assert plain.run.name == "default" and plain.runtime.kind == "ray"
    quick = compose("distill", ["experiment=quickstart"])[0]
    assert quick.run.name == "quickstart"
    local = compose("distill", ["experiment=quickstart", "runtime=local"])[0]
    assert local.runtime.kind == "local" and local.learner.num_ranks == 1 and local.rollout.num_workers == 1
    assert local == compose("distill", ["runtime=local", "experiment=quickstart"])[0]
    assert local.stages == quick.stages and local.data == quick.data
    over = compose("distill", ["stages.distill.steps=7", "learner=default", "experiment=quickstart"])[0]
    assert over.stages.distill.steps == 7, "a key given on the command line is over every file"


def test_quickstart_is_its_experiment_unless_another_is_named() -> None:
    assert compose("quickstart", [])[0] == compose("distill", ["experiment=quickstart"])[0]
    assert compose("quickstart", ["~experiment"])[0] == compose("distill", [])[0]


def test_a_domain_of_a_folder_of_the_users_own(tmp_path: Path) -> None:
    for group, text in {
        "data": "# @package data.domains.sorting\ntask: number_sorting\nnum_eval: 5\n",
        "teachers": "# @package teachers.sorting\npath: /elsewhere/hf\ndomains: {sorting: 0.5}\n",
    }.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "sorting.yaml").write_text(text)
    overrides = ["data=[spell_backward,sorting]", "teachers=[spell_backward,sorting]"]
    added = compose("distill", overrides, str(tmp_path))[0]
    assert list(added.data.domains) == ["spell_backward", "sorting"]
    assert added.data.domains["sorting"] == DomainConfig(task="number_sorting", num_eval=5)
    assert added.data.domains["spell_backward"] == _composed().data.domains["spell_backward"]
    assert teacher_routes(added) == {"spell_backward": (("spell_backward", 1.0),), "sorting": (("sorting", 0.5),)}
    with pytest.raises(ConfigError, match=r"=sorting selects no file"):
        compose("distill", overrides)
    with pytest.raises(ConfigError, match=r"data=sort selects no file; data has: .*, sorting"):
        compose("distill", ["data=[sort]"], str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package data.domains.x\ntask: chain_sum\nnum_evil: 5\n", "Key 'num_evil' not in 'DomainConfig'"),
        ("# @package data.domains.x\ntask: chain_sum\nnum_eval: five\n", "'five' .*Integer.*data.domains.x.num_eval"),
        ("# @package _global_\nsped: 1\n", "Key 'sped' not in 'Config'"),
        ("# @package data.domains.x\ntask: [\n", "is not YAML.*x.yaml"),
        ("# @package data.domains.x\ntask: nothing\nsource: web\n", "data.domains.x.source=web"),
    ],
)
def test_mistakes_in_a_file_of_the_users_own(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose("base", ["data=[x]"], str(tmp_path))


def test_a_folder_of_the_users_own_must_be_there_and_hide_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir .*/nowhere is not a folder"):
        compose("base", [], str(tmp_path / "nowhere"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "spell_backward.yaml").write_text(
        "# @package data.domains.spell_backward\ntask: spell_backward\n"
    )
    with pytest.raises(ConfigError, match=r"data/spell_backward\.yaml is also a file of conf/"):
        compose("base", [], str(tmp_path))


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")))
def test_every_file_of_conf_composes_and_says_what_it_sets(file: str) -> None:
    group, name = Path(file).parent.name, Path(file).stem
    if group == "conf":
        compose("distill", [])
        return
    assert group in GROUPS
    overrides = [f"{group}=[{name}]"] if group in ("data", "teachers") else [f"{group}={name}"]
    if name == "hf":
        overrides.append("model.path=some/model")
    if name == "endpoint":
        overrides.append("stages.distill.loss=sampled_reverse_kl")
    _, plain = compose("distill", overrides)
    text = (ROOT / file).read_text()
    package = re.search(r"@package (\S+)", text)
    keys = ["_global_"] if package and package[1] == "_global_" else (package[1] if package else group).split(".")
    settings = yaml.safe_load(text)
    settings.pop("defaults", None)
    composed = plain if keys == ["_global_"] else functools.reduce(operator.getitem, keys, plain)
    if name != "hf":
        assert_contains(composed, settings)


def assert_contains(composed: Any, settings: Any) -> None:
    """Every setting of a file is in what was composed, unless it is an interpolation."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            assert_contains(composed[key], value)
    elif not (isinstance(settings, str) and ("${" in settings or "???" in settings)):
        assert composed == settings or composed == float(settings)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    assert isinstance(compose(command, [])[0], Config)


# --- nothing is ignored -----------------------------------------------------------------------------------------------

# What a record is called where it is read: `config.eval_path` counts for DomainConfig, `path.eval_path` would not.
CALLED = {
    "Config": {"config", "seeded"},
    "RunConfig": {"run"},
    "ModelConfig": {"model", "config", "student", "model_config"},
    "TokenizerConfig": {"tokenizer"},
    "DomainConfig": {"domain", "config", "_config"},
    "DataConfig": {"data"},
    "CompletionConfig": {"sampling"},
    "RolloutConfig": {"rollout"},
    "TeacherConfig": {"teacher", "config", "_teachers"},
    "RemoteConfig": {"remote", "_remote"},
    "PoolConfig": {"pool"},
    "LearnerConfig": {"_learner", "learner"},
    "LoraConfig": {"lora"},
    "OptimizerConfig": {"optimizer", "config"},
    "RuntimeConfig": {"runtime", "config"},
    "StagesConfig": {"stages"},
    "StageConfig": {"stage", "settings"},
    "GrpoConfig": {"stage", "settings"},
    "DistillConfig": {"stage", "settings", "distill"},
    "CorrectionConfig": {"correction"},
    "CheckpointConfig": {"checkpoint", "_keep"},
    "EvalConfig": {"eval"},
    "TrackingConfig": {"tracking"},
}


def _reads(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(last name of the owner, attribute) of each attribute that is read, and ("", text) of each string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            yield name, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "", node.value


def _records(cls: Any) -> set[Any]:
    """The dataclass and all it is made of, by its default values."""
    made = cls()
    values = [getattr(made, entry.name) for entry in dataclasses.fields(made)]
    return {cls}.union(*(_records(type(value)) for value in values if dataclasses.is_dataclass(value)))


def test_every_key_is_read_somewhere() -> None:
    reads: set[tuple[str, str]] = set()
    for package in ("opd", "rollout", "teachers"):
        for path in (ROOT / package).rglob("*.py"):
            tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
            if path == ROOT / "opd" / "config.py":  # its checks read everything; its routing is the real thing
                tree = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "teacher_routes")
            reads |= set(_reads(tree))
    records = _records(Config) | _records(DomainConfig) | _records(TeacherConfig)
    assert {record.__name__ for record in records} == CALLED.keys()
    unread = [
        f"{record.__name__}.{entry.name}"
        for record in sorted(records, key=lambda record: record.__name__)
        for entry in dataclasses.fields(record)
        if not any((owner, entry.name) in reads for owner in CALLED[record.__name__])
        # Stages are looked up by their name.
        and not (record.__name__ == "StagesConfig" and ("", entry.name) in reads)
    ]
    assert unread == []


def test_the_search_for_unread_keys_sees_one() -> None:
    reads = set(_reads(ast.parse("a.domain.eval_path; path.where; x = self._teachers[n].revision; y.steps = 1")))
    assert ("domain", "eval_path") in reads and ("domain", "where") not in reads
    assert ("_teachers", "revision") in reads and not any(name == "steps" for _, name in reads)


REMOTE = TeacherConfig(path="http://127.0.0.1:1/v1", family="remote", tokenizer="t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mixed_kl", "mix": 1.5}, r"distill\.mix=1\.5 is not in \[0, 1\]"),
        ({"loss": "jensen_shannon", "beta": 1.0}, r"distill\.beta=1\.0 is not in \(0, 1\); .*loss=forward_kl"),
        ({"loss": "topk_reverse_kl", "top_k": 0}, r"distill\.top_k=0 .*at least 1"),
        (
            {"loss": "topk_reverse_kl", "mix": 0.1},
            r"distill\.mix=0\.1 would be ignored: .*loss=topk_reverse_kl has none",
        ),
        ({"loss": "sampled_reverse_kl", "advantage_clip": 0.0}, r"distill\.advantage_clip=0\.0 .*above 0"),
        ({"loss": "sampled_reverse_kl", "baseline": "value"}, r"distill\.baseline=value .*none, kl"),
        ({"loss": "sampled_reverse_kl_k2", "baseline": "kl"}, r"distill\.baseline=kl would be ignored"),
        (
            {"loss": "sampled_forward_kl", "temperature": 0.8},
            r"temperature=0\.8 and .*kl_temperature=1\.0 must be equal",
        ),
        ({"loss": "topk_sampled_reverse_kl", "kl_temperature": 2.0}, r"kl_temperature=2\.0 must be equal"),
        ({"correction__veto": 1e-4, "temperature": 0.0}, r"temperature=0 cannot work with .*correction"),
        ({"masked_ids": [3, -1]}, r"distill\.masked_ids\[1\]=-1 .*at least 0"),
        ({"loss": "topk_forward_kl", "correction__ratio": "mis"}, r"correction\.ratio=mis would be ignored"),
        (
            {"loss": "sampled_reverse_kl", "correction__ratio": "icepop", "correction__low": 3.0},
            r"high=2\.0 .*above 3\.0",
        ),
    ],
)
def test_losses_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**{f"stages__distill__{key}": value for key, value in changes.items()}))


def test_losses_that_their_teachers_or_rollouts_do_not_allow() -> None:
    def check(**changes: Any) -> None:
        others = {key: changes.pop(key) for key in list(changes) if key == "teachers" or "__" in key}
        stage = {f"stages__distill__{key}": value for key, value in changes.items()}
        check_config(config(stages__grpo__steps=0, **stage, **others))

    remote = {"teachers": {"api": REMOTE}}
    for loss in ("reverse_kl", "forward_kl", "mixed_kl", "jensen_shannon"):
        with pytest.raises(ConfigError, match=f"loss={loss} needs hidden states, and teachers.api.family=remote"):
            check(loss=loss, **remote)
    with pytest.raises(ConfigError, match="baseline=kl needs hidden states"):
        check(loss="sampled_reverse_kl", baseline="kl", **remote)
    with pytest.raises(ConfigError, match=r"teachers\.api\.remote\.top_k=0 is too small; .*top_k=64"):
        check(loss="topk_tail_reverse_kl", **remote)
    with pytest.raises(ConfigError, match=r"kl_temperature=2\.0 must be 1\.0: .*teachers\.api"):
        check(loss="sampled_reverse_kl", kl_temperature=2.0, temperature=2.0, **remote)
    check(loss="sampled_reverse_kl", **remote)
    check(loss="reverse_kl", steps=0, **remote)  # no distillation, nothing to refuse
    for key, value in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)):
        truncated = {f"rollout__sampling__{key}": value}
        check(**truncated)
        for loss in ("sampled_reverse_kl", "topk_sampled_reverse_kl"):
            with pytest.raises(ConfigError, match=f"{key}={value}.* must be off .*distill.loss={loss}"):
                check(loss=loss, **truncated)
        with pytest.raises(ConfigError, match=r"must be off .*stages\.distill\.correction"):
            check(stages__distill__correction__max_mean_gap=0.1, **truncated)


def test_losses_and_corrections_that_make_sense() -> None:
    for changes in (
        {"loss": "mixed_kl", "mix": 0.2},
        {"loss": "jensen_shannon", "beta": 0.1, "masked_ids": [0, 1]},
        {"loss": "topk_reverse_kl", "top_k": 8, "correction__max_mean_gap": 0.1, "correction__veto": 1e-4},
        {"loss": "topk_sampled_reverse_kl", "correction__ratio": "tis", "correction__high": 3.0},
        {"loss": "sampled_reverse_kl", "advantage_clip": 5.0, "baseline": "kl", "correction__ratio": "icepop"},
        {
            "loss": "sampled_forward_kl",
            "correction__ratio": "icepop",
            "correction__low": 0.2,
            "correction__max_k3": 0.1,
        },
        {"reference_kl": 0.1},
    ):
        check_config(config(**{f"stages__distill__{key}": value for key, value in changes.items()}))
    check_config(config(stages__grpo__correction__opsm_delta=0.5, stages__grpo__correction__max_mean_gap=0.1))
