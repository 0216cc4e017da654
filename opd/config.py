"""The whole configuration as dataclasses: one per group of `conf/`, with the checks that need more than one field.

Hydra composes YAML onto these types, so a misspelt key or a string where a number belongs is an error before anything
starts. `check_config` then refuses what cannot work. Field comments state the unit and what is allowed; the README's
table of keys points here. Nothing in this file imports torch, ray or hydra. It is over the usual length because keys
and what is allowed of them belong in one place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

EFFORTS = ("none", "high", "max")


class ConfigError(ValueError):
    """A mistake of the user's: the command line turns it into one message and exit status 2."""


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ConfigError naming `key` unless `value` is in `allowed`."""
    if value not in allowed:
        shown = ", ".join("null" if choice is None else str(choice) for choice in allowed)
        raise ConfigError(f"{key}={'null' if value is None else value} is not allowed; choose one of {shown}")


def at_least(key: str, value: float | None, lowest: float) -> None:
    """Raises ConfigError naming `key` for a value below `lowest`, and for NaN; None passes."""
    if value is not None and not value >= lowest:
        raise ConfigError(f"{key}={value} is too small; it must be at least {lowest}")


def above(key: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ConfigError(f"{key}={value} is too small; it must be above {bound}")


def within(key: str, value: float, lowest: float, highest: float, *, below: bool = False) -> None:
    """Raises ConfigError naming `key` unless `value` is in [lowest, highest], or [lowest, highest) with `below`."""
    if not lowest <= value <= highest or (below and value == highest):
        raise ConfigError(f"{key}={value} is not in [{lowest}, {highest}{')' if below else ']'}")


def unset(key: str, value: object, default: object, why: str) -> None:
    """Raises ConfigError naming `key` when a setting that nothing would read has been given a value."""
    if value != default:
        shown = "null" if default is None else default
        raise ConfigError(f"{key}={value} would be ignored: {why}; leave it at {shown}")


@dataclass
class RunConfig:
    name: str = MISSING  # folder name under `root`
    root: str = "runs"  # parent folder of all runs
    overwrite: bool = False  # replace an existing run of this name; false refuses a folder that holds one

    @property
    def dir(self) -> str:
        return os.path.join(self.root, self.name)


@dataclass
class ModelConfig:
    """The student (and base). `path` loads weights; without it a `deepseek_v4` is built from `config`."""

    family: str = "deepseek_v4"  # deepseek_v4 | hf
    path: str | None = None  # local folder or hub id of a checkpoint to start from
    tokenizer: str | None = None  # folder or hub id; null: the one beside `path`
    revision: str | None = None  # of a hub id
    config: dict[str, Any] = field(default_factory=dict)  # fields of transformers' DeepseekV4Config, by those names
    max_tokens: int = 128  # context of this run: prompt and completion together
    # Which weights are trained, published and sampled as MXFP4: experts (routed, of a deepseek_v4) | linears (the large
    # ones of an hf model) | none.
    fp4: str = "experts"
    fp4_index: bool = False  # V4's lightning indexer: queries and keys rotated by a Hadamard matrix, then MXFP4


@dataclass
class TokenizerConfig:
    """The byte-level BPE that `opd tokenizer` trains on the domains' own text."""

    vocab_size: int = 1024
    samples_per_domain: int = 4000


@dataclass
class DomainConfig:
    """Prompts plus a verifier."""

    source: str = "reasoning_gym"  # reasoning_gym | rows
    # source reasoning_gym
    task: str | None = None  # name of a reasoning-gym dataset
    params: dict[str, Any] = field(default_factory=dict)  # its difficulty settings
    # source rows
    path: str | None = None  # local .jsonl/.json/.parquet file, or a hub id
    split: str = "train"
    eval_path: str | None = None  # held-out rows; null: `eval_fraction` of `path` is held out, by a hash of the prompt
    eval_fraction: float = 0.1
    columns: dict[str, str] = field(default_factory=dict)  # our name -> column, e.g. {prompt: question}
    where: str | None = None  # keep rows whose data_source is this; null: the domain's own name, if rows carry one
    # both
    verifier: str | None = None  # task (reasoning-gym's own score) | exact | number | choice; null: by the source
    answer_format: str = "plain"  # plain | tags | boxed: what the verifier reads in the completion
    instruction: str | None = None  # system text that states the format; null: the one of `answer_format`
    effort: str = "none"  # none | high | max
    num_train: int = 100_000  # distinct training questions to draw from, before held-out ones are removed
    num_eval: int = 200  # held-out questions
    weight: float = 1.0  # share of a mixed step's prompts
    seed: int = 0  # of the task's generator; evaluation uses another stream


@dataclass
class DataConfig:
    domains: dict[str, DomainConfig] = field(default_factory=dict)


@dataclass
class CompletionConfig:
    """How rollouts are drawn; their temperature is the stage's. Evaluations share `max_new_tokens` only."""

    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # cuts off tokens less likely than this share of the likeliest; 0: off
    max_new_tokens: int = 32


@dataclass
class SamplingConfig(CompletionConfig):
    """What an engine is asked for."""

    temperature: float = 1.0  # 0 is greedy


@dataclass
class RolloutConfig:
    num_workers: int = 1
    num_slots: int = 64  # trajectories decoded at once by a worker
    prefill_tokens: int = 8192  # most tokens of prompts (padding included) read between two decoding steps
    # Of a worker's cache (deepseek_v4). When it is full, the youngest trajectories wait and are read again later. null:
    # as much as all slots at full length can need.
    cache_bytes: int | None = None
    # What a sampled token outlives. none: nothing, a dead worker's trajectories are sampled anew | process: the death
    # of its worker | machine: a power failure, for one flush of the disk per token (scripts/bench rollout measures it).
    wal: str = "process"
    sampling: CompletionConfig = field(default_factory=CompletionConfig)


@dataclass
class TeacherConfig:
    """One specialist: `conf/teachers/<name>.yaml`."""

    path: str = MISSING  # checkpoint folder or hub id
    domains: dict[str, float] = field(default_factory=dict)  # domain -> weight; empty: the domain of the teacher's name
    family: str = "deepseek_v4"  # deepseek_v4 | hf
    residency: str = "host"  # host: weights stay in memory | disk: loaded when its turn comes
    default: bool = False  # also serve every domain that has no teacher
    tokenizer: str | None = None  # null: the one beside `path`
    revision: str | None = None


@dataclass
class OptimizerConfig:
    name: str = "muon"  # muon (matrices by Muon, the rest by AdamW) | adamw
    weight_decay: float = 0.1
    momentum: float = 0.95  # Muon
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-20  # AdamW; V4's value


@dataclass
class LearnerConfig:
    num_ranks: int = 1  # data-parallel DeepSpeed processes
    zero_stage: int = 0  # 0 | 1 | 2
    micro_batch_tokens: int = 8192  # padded tokens of one forward and backward
    grad_clip: float = 1.0  # global norm; 0: off
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    kl_tile_tokens: int = 1024  # tile of the exact KL: tokens by vocabulary entries
    kl_tile_vocab: int = 8192
    balance_loss: float = 1e-4  # V4's sequence-wise expert balance loss
    balance_bias_speed: float = 1e-3  # step of the router's selection bias


@dataclass
class RuntimeConfig:
    kind: str = "ray"  # ray | local
    address: str | None = None  # of a running Ray cluster; null: start one here
    num_cpus: int | None = None  # of a cluster started here; null: what the machine has
    object_store_gb: float | None = None  # shared memory of a cluster started here; null: Ray's own choice
    actor_threads: int = 1  # torch threads of each actor
    cpus_per_actor: float = 0.0  # CPUs an actor reserves on a cluster; 0: phases take turns on the same cores
    device: str = "auto"  # auto | cpu | cuda
    num_teacher_hosts: int = 1  # actors among which the teachers are spread
    gpus_per_worker: float = 0.0  # Ray resources per rollout worker, teacher host and learner rank
    gpus_per_teacher: float = 0.0
    gpus_per_rank: float = 0.0
    timeout_seconds: float = 1800.0  # longest one phase of a step may take


@dataclass
class StageConfig:
    """One stretch of training: SFT of the base, SFT and GRPO of a specialist, or distillation. Demonstrations (base,
    sft) are not sampled, so `group_size` and `temperature` belong to the other two."""

    steps: int = 100
    prompts_per_step: int = 64
    group_size: int = 1  # trajectories per prompt
    learning_rate: float = 1e-3
    warmup_steps: int = 10  # linear, from a tenth
    decay_fraction: float = 0.0  # last share of the steps over which the rate falls linearly to a tenth
    temperature: float = 1.0  # of the rollouts
    eval_every: int = 0  # steps between evaluations inside the stage, the last step included; 0: none
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end
    # V4's lightning indexer gets no gradient from the loss of its model. This weight is of its own loss, which moves it
    # alone, and which exists where a sequence has more CSA blocks than `index_topk`.
    indexer_loss: float = 1.0
    indexer_dense_steps: int = 0  # the first steps attend to all blocks and compare over all of them (warm-up)
    # Of the loss of multi-token prediction, where the model has the block (model.config.num_nextn_predict_layers=1); a
    # third of it over the steps of `decay_fraction`, as V4's 0.3 and 0.1. Learned from demonstrations only; 0: frozen.
    mtp_weight: float = 0.3


@dataclass
class GrpoConfig(StageConfig):
    group_size: int = 8
    clip: float = 0.2  # epsilon of the ratio clip
    kl_coefficient: float = 0.0  # beta of V3.2's unbiased KL to the SFT policy; 0: no reference
    indexer_loss: float = 0.0
    mtp_weight: float = 0.0


@dataclass
class DistillConfig(StageConfig):
    kl_temperature: float = 1.0  # tau: both logits are divided by it
    hidden_dtype: str = "bfloat16"  # bfloat16 | float32: how the teachers' hidden states are stored and sent
    indexer_loss: float = 0.0
    mtp_weight: float = 0.0


@dataclass
class StagesConfig:
    base: StageConfig = field(default_factory=StageConfig)
    sft: StageConfig = field(default_factory=StageConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class EvalConfig:
    samples: int = 4  # k of pass@k: sampled completions per prompt beside the greedy one; 0: greedy only
    temperature: float = 1.0
    inline_prompts: int = 64  # per domain, for evaluations inside a run


@dataclass
class TrackingConfig:
    wandb: str = "offline"  # offline | online | disabled
    project: str = "opd"
    entity: str | None = None


@dataclass
class Config:
    seed: int = 0
    domain: str | None = None  # `opd specialist`: the one to train
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check_keys(values: Mapping[str, Any], record: Any, key: str = "") -> None:
    """Raises ConfigError for a key of `values` (plain containers) that its dataclass `record` lacks.

    YAML files and plain overrides cannot name one, but Hydra's +key=value adds whatever it is told to.
    """
    known = [entry.name for entry in fields(record)]
    for name, value in values.items():
        full = f"{key}.{name}" if key else name
        if name not in known:
            raise ConfigError(f"{full} is not a key; {key or 'the configuration'} has: {', '.join(known)}")
        below = getattr(record, name)
        if is_dataclass(below):
            check_keys(value, below, full)
        elif isinstance(below, dict):
            for inner, child in below.items():
                if is_dataclass(child):
                    check_keys(value[inner], child, f"{full}.{inner}")


def teacher_routes(config: Config) -> dict[str, tuple[tuple[str, float], ...]]:
    """Domain -> ((teacher, weight), ...). Raises ConfigError for a domain without a teacher or an unknown domain."""
    routes: dict[str, list[tuple[str, float]]] = {domain: [] for domain in config.data.domains}
    known = ", ".join(routes) or "none"
    for name, teacher in config.teachers.items():
        for domain, weight in (teacher.domains or {name: 1.0}).items():
            if domain not in routes:
                if not teacher.domains and teacher.default:
                    continue  # named after no domain, and there to serve the ones nobody else does
                raise ConfigError(
                    f"teachers.{name}.domains names the unknown domain {domain!r}; data.domains has: {known}"
                )
            at_least(f"teachers.{name}.domains.{domain}", weight, 0.0)
            if weight > 0:
                routes[domain].append((name, weight))
    defaults = [name for name, teacher in config.teachers.items() if teacher.default]
    if len(defaults) > 1:
        raise ConfigError(f"teachers.*.default is true for {', '.join(defaults)}; at most one may be the default")
    for domain, served_by in routes.items():
        if not served_by and defaults:
            served_by.append((defaults[0], 1.0))
        if not served_by:
            raise ConfigError(
                f"data.domains.{domain} has no teacher; teachers: {', '.join(config.teachers) or 'none'}. Add "
                f"conf/teachers/{domain}.yaml and its name to the teachers list, or set default: true on one teacher"
            )
    return {domain: tuple(served_by) for domain, served_by in routes.items()}


def check_config(config: Config) -> None:
    """Raises ConfigError for settings that cannot work, or that would be ignored, whatever the command."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", config.run.name) or ".." in config.run.name:
        raise ConfigError(f"run.name={config.run.name!r} is not a folder name; use letters, digits, _ - . and /")
    _check_model(config)
    if not config.data.domains:
        raise ConfigError("data.domains is empty; name at least one domain, for example data=[chain_sum]")
    for name, domain in config.data.domains.items():
        _check_name(f"data.domains.{name}", name)
        _check_domain(f"data.domains.{name}", domain)
    if config.domain is not None:
        one_of("domain", config.domain, tuple(config.data.domains))
    for name, teacher in config.teachers.items():
        _check_name(f"teachers.{name}", name)
        one_of(f"teachers.{name}.family", teacher.family, ("deepseek_v4", "hf"))
        one_of(f"teachers.{name}.residency", teacher.residency, ("host", "disk"))
    _check_rollout(config)
    _check_learner(config.learner, config.model.max_tokens)
    _check_runtime(config)
    for stage in ("base", "sft", "grpo", "distill"):
        _check_stage(f"stages.{stage}", getattr(config.stages, stage))
    at_least("tokenizer.vocab_size", config.tokenizer.vocab_size, 300)
    at_least("tokenizer.samples_per_domain", config.tokenizer.samples_per_domain, 1)
    at_least("eval.samples", config.eval.samples, 0)
    at_least("eval.inline_prompts", config.eval.inline_prompts, 1)
    above("eval.temperature", config.eval.temperature, 0)
    one_of("tracking.wandb", config.tracking.wandb, ("offline", "online", "disabled"))


def _check_name(key: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{key}: {name!r} is part of folder and metric names; use letters, digits, _ - and .")


def _check_model(config: Config) -> None:
    model = config.model
    one_of("model.family", model.family, ("deepseek_v4", "hf"))
    one_of("model.fp4", model.fp4, ("experts", "linears", "none"))
    at_least("model.max_tokens", model.max_tokens, 2)
    if model.family == "hf" and not model.path:
        raise ConfigError("model.path is null; model.family=hf needs the folder or hub id of a checkpoint")
    if model.family == "hf" and model.fp4 == "experts":
        raise ConfigError("model.fp4=experts needs model.family=deepseek_v4; with family=hf it must be linears or none")
    if model.family == "deepseek_v4" and model.fp4 == "linears":
        raise ConfigError("model.fp4=linears needs model.family=hf; with family=deepseek_v4 it must be experts or none")
    if model.family == "hf" and model.fp4_index:
        raise ConfigError("model.fp4_index=true needs model.family=deepseek_v4; with family=hf it must be false")


def _check_domain(key: str, domain: DomainConfig) -> None:
    one_of(f"{key}.source", domain.source, ("reasoning_gym", "rows"))
    one_of(f"{key}.verifier", domain.verifier, (None, "task", "exact", "number", "choice"))
    one_of(f"{key}.answer_format", domain.answer_format, ("plain", "tags", "boxed"))
    one_of(f"{key}.effort", domain.effort, EFFORTS)
    at_least(f"{key}.num_eval", domain.num_eval, 1)
    at_least(f"{key}.num_train", domain.num_train, 1)
    at_least(f"{key}.weight", domain.weight, 0)
    within(f"{key}.eval_fraction", domain.eval_fraction, 0, 1, below=True)
    others: tuple[tuple[str, object, object], ...]
    if domain.source == "reasoning_gym":
        if not domain.task:
            raise ConfigError(f"{key}.task is null; source=reasoning_gym needs the name of a task")
        others = (
            ("path", domain.path, None),
            ("eval_path", domain.eval_path, None),
            ("columns", domain.columns, {}),
            ("where", domain.where, None),
        )
    else:
        if not domain.path:
            raise ConfigError(f"{key}.path is null; source=rows needs a file or a hub id")
        if domain.verifier == "task":
            raise ConfigError(f"{key}.verifier=task belongs to source=reasoning_gym; choose exact, number or choice")
        others = (("task", domain.task, None), ("params", domain.params, {}))
    for setting, value, default in others:
        unset(f"{key}.{setting}", value, default, f"it does not belong to source={domain.source}")


def _check_rollout(config: Config) -> None:
    rollout, sampling = config.rollout, config.rollout.sampling
    at_least("rollout.num_workers", rollout.num_workers, 1)
    at_least("rollout.num_slots", rollout.num_slots, 1)
    at_least("rollout.sampling.max_new_tokens", sampling.max_new_tokens, 1)
    at_least("rollout.sampling.top_k", sampling.top_k, 0)
    if not 0.0 < sampling.top_p <= 1.0:
        raise ConfigError(f"rollout.sampling.top_p={sampling.top_p} is not in (0, 1]")
    within("rollout.sampling.min_p", sampling.min_p, 0, 1, below=True)
    at_least("rollout.prefill_tokens", rollout.prefill_tokens, 1)
    at_least("rollout.cache_bytes", rollout.cache_bytes, 1)
    one_of("rollout.wal", rollout.wal, ("none", "process", "machine"))
    if config.model.family == "hf":
        why = "model.family=hf is decoded batch by batch, with transformers' own cache"
        unset("rollout.cache_bytes", rollout.cache_bytes, None, why)
        unset("rollout.prefill_tokens", rollout.prefill_tokens, RolloutConfig().prefill_tokens, why)
    if sampling.max_new_tokens >= config.model.max_tokens:
        raise ConfigError(
            f"rollout.sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in "
            f"model.max_tokens={config.model.max_tokens}"
        )
    if config.stages.grpo.steps > 0 and (sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0):
        raise ConfigError(
            f"rollout.sampling.top_p={sampling.top_p}, min_p={sampling.min_p} and top_k={sampling.top_k} must be off "
            "(1.0, 0 and 0) when stages.grpo.steps > 0: GRPO's ratio compares untruncated distributions"
        )


def _check_learner(learner: LearnerConfig, max_tokens: int) -> None:
    optimizer = learner.optimizer
    one_of("learner.zero_stage", learner.zero_stage, (0, 1, 2))
    one_of("learner.optimizer.name", optimizer.name, ("muon", "adamw"))
    for key, value, lowest in (
        ("num_ranks", learner.num_ranks, 1),
        ("micro_batch_tokens", learner.micro_batch_tokens, max_tokens),
        ("grad_clip", learner.grad_clip, 0),
        ("kl_tile_tokens", learner.kl_tile_tokens, 1),
        ("kl_tile_vocab", learner.kl_tile_vocab, 1),
        ("balance_loss", learner.balance_loss, 0),
        ("balance_bias_speed", learner.balance_bias_speed, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
    ):
        at_least(f"learner.{key}", value, lowest)
    within("learner.optimizer.momentum", optimizer.momentum, 0, 1, below=True)
    if len(tuple(optimizer.betas)) != 2:  # types of YAML lists are checked by entry only
        raise ConfigError(f"learner.optimizer.betas={list(optimizer.betas)} must have two entries")
    for index, beta in enumerate(optimizer.betas):
        within(f"learner.optimizer.betas[{index}]", beta, 0, 1, below=True)
    above("learner.optimizer.eps", optimizer.eps, 0)
    if learner.zero_stage > 0 and optimizer.name == "muon":
        raise ConfigError(
            f"learner.zero_stage={learner.zero_stage} with learner.optimizer.name=muon cannot work: ZeRO hands the "
            "optimizer flat slices, Muon needs matrices; use zero_stage=0 or optimizer.name=adamw"
        )


def _check_runtime(config: Config) -> None:
    runtime = config.runtime
    one_of("runtime.kind", runtime.kind, ("ray", "local"))
    one_of("runtime.device", runtime.device, ("auto", "cpu", "cuda"))
    for key, lowest in (
        ("actor_threads", 1),
        ("num_teacher_hosts", 1),
        ("num_cpus", 1),
        ("object_store_gb", 0.08),
        ("cpus_per_actor", 0),
        ("gpus_per_worker", 0),
        ("gpus_per_teacher", 0),
        ("gpus_per_rank", 0),
    ):
        at_least(f"runtime.{key}", getattr(runtime, key), lowest)
    above("runtime.timeout_seconds", runtime.timeout_seconds, 0)
    if runtime.kind == "local":
        if config.learner.num_ranks != 1:
            raise ConfigError(
                f"learner.num_ranks={config.learner.num_ranks} needs one process per rank; use runtime=ray or "
                "num_ranks=1"
            )
        unset("runtime.address", runtime.address, None, "runtime.kind=local joins no cluster")


def _check_stage(key: str, stage: StageConfig) -> None:
    for setting, lowest in (
        ("steps", 0),
        ("prompts_per_step", 1),
        ("group_size", 1),
        ("learning_rate", 0),
        ("warmup_steps", 0),
        ("temperature", 0),
        ("eval_every", 0),
        ("checkpoint_every", 0),
        ("indexer_loss", 0),
        ("indexer_dense_steps", 0),
        ("mtp_weight", 0),
    ):
        at_least(f"{key}.{setting}", getattr(stage, setting), lowest)
    within(f"{key}.decay_fraction", stage.decay_fraction, 0, 1)
    if isinstance(stage, GrpoConfig | DistillConfig):
        unset(f"{key}.mtp_weight", stage.mtp_weight, 0.0, "multi-token prediction learns from demonstrations only")
    match stage:
        case GrpoConfig():
            above(f"{key}.clip", stage.clip, 0)
            at_least(f"{key}.kl_coefficient", stage.kl_coefficient, 0)
            if stage.steps > 0 and stage.group_size < 2:
                raise ConfigError(
                    f"{key}.group_size={stage.group_size} gives every trajectory an advantage of zero; it must be at "
                    "least 2"
                )
            if stage.steps > 0 and stage.temperature == 0:
                raise ConfigError(
                    f"{key}.temperature={stage.temperature} cannot work: GRPO's ratio needs a sampling distribution; "
                    "it must be above 0"
                )
        case DistillConfig():
            above(f"{key}.kl_temperature", stage.kl_temperature, 0)
            one_of(f"{key}.hidden_dtype", stage.hidden_dtype, ("bfloat16", "float32"))
        case _:
            for setting, default in (("group_size", 1), ("temperature", 1.0)):
                unset(f"{key}.{setting}", getattr(stage, setting), default, "demonstrations are not sampled")
