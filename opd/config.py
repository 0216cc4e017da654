"""The whole configuration as dataclasses: one per group of `conf/`, with the checks that need more than one field.

Hydra composes YAML onto these types, so a misspelt key or a string where a number belongs is an error before anything
starts. `check_config` then refuses what cannot work. Field comments state the unit and what is allowed; the README's
table of keys points here. Nothing in this file imports torch, ray or hydra.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

EFFORTS = ("none", "high", "max")


class ConfigError(ValueError):
    """A mistake of the user's: the command line turns it into one message and exit status 2."""


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ConfigError naming `key` unless `value` is in `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is not allowed; choose one of {', '.join(map(str, allowed))}")


def at_least(key: str, value: float | None, lowest: float) -> None:
    if value is not None and value < lowest:
        raise ConfigError(f"{key}={value} is too small; it must be at least {lowest}")


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
    fp4: str = "experts"  # experts | none: which weights are trained, published and sampled as MXFP4


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
class SamplingConfig:
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_new_tokens: int = 32


@dataclass
class RolloutConfig:
    num_workers: int = 1
    num_slots: int = 64  # trajectories decoded at once by a worker
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


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
    """One stretch of training: SFT of the base, SFT and GRPO of a specialist, or distillation."""

    steps: int = 100
    prompts_per_step: int = 64
    group_size: int = 1  # trajectories per prompt
    learning_rate: float = 1e-3
    warmup_steps: int = 10  # linear, from a tenth
    decay_fraction: float = 0.0  # last share of the steps over which the rate falls linearly to a tenth
    temperature: float = 1.0  # of the rollouts
    eval_every: int = 0  # steps between evaluations inside the run; 0: only at the end
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end


@dataclass
class GrpoConfig(StageConfig):
    group_size: int = 8
    clip: float = 0.2  # epsilon of the ratio clip
    kl_coefficient: float = 0.0  # beta of V3.2's unbiased KL to the SFT policy; 0: no reference


@dataclass
class DistillConfig(StageConfig):
    kl_temperature: float = 1.0  # tau: both logits are divided by it


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
        raise ConfigError(f"teachers.*.default is true for {', '.join(defaults)}; at most one teacher may be the default")
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
    """Raises ConfigError for settings that cannot work, whatever the command."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", config.run.name) or ".." in config.run.name:
        raise ConfigError(f"run.name={config.run.name!r} is not a folder name; use letters, digits, _ - . and /")
    one_of("model.family", config.model.family, ("deepseek_v4", "hf"))
    one_of("model.fp4", config.model.fp4, ("experts", "none"))
    if config.model.family == "hf" and not config.model.path:
        raise ConfigError("model.path is null; model.family=hf needs the folder or hub id of a checkpoint")
    if not config.data.domains:
        raise ConfigError("data.domains is empty; name at least one domain, for example data=[chain_sum]")
    for name, domain in config.data.domains.items():
        key = f"data.domains.{name}"
        one_of(f"{key}.source", domain.source, ("reasoning_gym", "rows"))
        one_of(f"{key}.verifier", domain.verifier, (None, "task", "exact", "number", "choice"))
        one_of(f"{key}.answer_format", domain.answer_format, ("plain", "tags", "boxed"))
        one_of(f"{key}.effort", domain.effort, EFFORTS)
        at_least(f"{key}.num_eval", domain.num_eval, 1)
        at_least(f"{key}.num_train", domain.num_train, 1)
        at_least(f"{key}.weight", domain.weight, 0)
        if not 0.0 <= domain.eval_fraction < 1.0:
            raise ConfigError(f"{key}.eval_fraction={domain.eval_fraction} is not in [0, 1)")
        if domain.source == "reasoning_gym" and not domain.task:
            raise ConfigError(f"{key}.task is null; source=reasoning_gym needs the name of a task")
        if domain.source == "rows" and not domain.path:
            raise ConfigError(f"{key}.path is null; source=rows needs a file or a hub id")
        if domain.source == "rows" and domain.verifier == "task":
            raise ConfigError(f"{key}.verifier=task belongs to source=reasoning_gym; choose exact, number or choice")
    if config.domain is not None:
        one_of("domain", config.domain, tuple(config.data.domains))
    for name, teacher in config.teachers.items():
        one_of(f"teachers.{name}.family", teacher.family, ("deepseek_v4", "hf"))
        one_of(f"teachers.{name}.residency", teacher.residency, ("host", "disk"))
    one_of("learner.zero_stage", config.learner.zero_stage, (0, 1, 2))
    one_of("learner.optimizer.name", config.learner.optimizer.name, ("muon", "adamw"))
    one_of("runtime.kind", config.runtime.kind, ("ray", "local"))
    one_of("runtime.device", config.runtime.device, ("auto", "cpu", "cuda"))
    one_of("tracking.wandb", config.tracking.wandb, ("offline", "online", "disabled"))
    if config.runtime.kind == "local" and config.learner.num_ranks != 1:
        raise ConfigError(
            f"learner.num_ranks={config.learner.num_ranks} needs one process per rank; use runtime=ray or num_ranks=1"
        )
    for key, value, lowest in (
        ("model.max_tokens", config.model.max_tokens, 2),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, 300),
        ("rollout.num_workers", config.rollout.num_workers, 1),
        ("rollout.num_slots", config.rollout.num_slots, 1),
        ("rollout.sampling.temperature", config.rollout.sampling.temperature, 0),
        ("rollout.sampling.max_new_tokens", config.rollout.sampling.max_new_tokens, 1),
        ("rollout.sampling.top_k", config.rollout.sampling.top_k, 0),
        ("learner.num_ranks", config.learner.num_ranks, 1),
        ("learner.micro_batch_tokens", config.learner.micro_batch_tokens, config.model.max_tokens),
        ("learner.kl_tile_tokens", config.learner.kl_tile_tokens, 1),
        ("learner.kl_tile_vocab", config.learner.kl_tile_vocab, 1),
        ("learner.grad_clip", config.learner.grad_clip, 0),
        ("runtime.actor_threads", config.runtime.actor_threads, 1),
        ("runtime.num_teacher_hosts", config.runtime.num_teacher_hosts, 1),
        ("runtime.num_cpus", config.runtime.num_cpus, 1),
        ("runtime.object_store_gb", config.runtime.object_store_gb, 0.08),
        ("runtime.cpus_per_actor", config.runtime.cpus_per_actor, 0),
        ("eval.samples", config.eval.samples, 0),
        ("eval.inline_prompts", config.eval.inline_prompts, 1),
        ("stages.distill.kl_temperature", config.stages.distill.kl_temperature, 1e-3),
    ):
        at_least(key, value, lowest)
    if not 0.0 < config.rollout.sampling.top_p <= 1.0:
        raise ConfigError(f"rollout.sampling.top_p={config.rollout.sampling.top_p} is not in (0, 1]")
    if config.rollout.sampling.max_new_tokens >= config.model.max_tokens:
        raise ConfigError(
            f"rollout.sampling.max_new_tokens={config.rollout.sampling.max_new_tokens} leaves no room for a prompt in "
            f"model.max_tokens={config.model.max_tokens}"
        )
    for stage in ("base", "sft", "grpo", "distill"):
        settings: StageConfig = getattr(config.stages, stage)
        at_least(f"stages.{stage}.steps", settings.steps, 0)
        at_least(f"stages.{stage}.prompts_per_step", settings.prompts_per_step, 1)
        at_least(f"stages.{stage}.group_size", settings.group_size, 1)
        at_least(f"stages.{stage}.learning_rate", settings.learning_rate, 0)
    if config.stages.grpo.group_size < 2 and config.stages.grpo.steps > 0:
        raise ConfigError(
            f"stages.grpo.group_size={config.stages.grpo.group_size} gives every trajectory an advantage of zero; "
            "it must be at least 2"
        )
    sampling = config.rollout.sampling
    if config.stages.grpo.steps > 0 and (sampling.top_p < 1.0 or sampling.top_k > 0):
        raise ConfigError(
            "rollout.sampling.top_p and top_k must be off (1.0 and 0) when stages.grpo.steps > 0: GRPO's ratio compares "
            "untruncated distributions"
        )
