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
from typing import Any, Literal, get_args

from omegaconf import MISSING

EFFORTS = ("none", "high", "max")

# What distillation can minimise; `DistillConfig` has the formulas.
FullLoss = Literal["reverse_kl", "forward_kl", "mixed_kl", "jensen_shannon"]
TopkLoss = Literal[
    "topk_reverse_kl",
    "topk_renormalised_reverse_kl",
    "topk_tail_reverse_kl",
    "topk_sampled_reverse_kl",
    "topk_forward_kl",
]
SampledLoss = Literal["sampled_reverse_kl", "sampled_reverse_kl_k2", "sampled_forward_kl"]
FULL_LOSSES, TOPK_LOSSES, SAMPLED_LOSSES = get_args(FullLoss), get_args(TopkLoss), get_args(SampledLoss)


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
class LoraConfig:
    """Low-rank adapters, trained in place of an hf model's own weights; checkpoints and rollouts get them merged."""

    rank: int = 0  # 0: off, all weights are trained
    alpha: float = 16.0  # the adapter's product is multiplied by alpha / rank
    targets: list[str] = field(default_factory=list)  # last names of the matrices; empty: all of the layers'


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
    lora: LoraConfig = field(default_factory=LoraConfig)  # of family hf


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
    # Whether grpo and distill train on the experts that the samplers sent each token to (R3, arXiv 2510.11370; of a
    # deepseek_v4 with learned routing). The router is trained all the same: it weighs them, and has not chosen them.
    # Two bytes for each expert of a token: of all slots at full length in a worker, of a step's tokens on their way.
    routing_replay: bool = False
    sampling: CompletionConfig = field(default_factory=CompletionConfig)


@dataclass
class RemoteConfig:
    """How a teacher of `family: remote` is asked: a server that returns the log-probabilities of a prompt's tokens."""

    server: str = "vllm"  # vllm: /completions with prompt_logprobs | sglang: /generate
    replicas: list[str] = field(default_factory=list)  # base URLs of further servers of the same model
    model: str | None = None  # its name there; null: the only one that is served
    top_k: int = 0  # most likely tokens asked for at each position; 0: the sampled token's log-probability alone
    api_key_env: str | None = None  # environment variable that holds the key; null: none is sent
    timeout_seconds: float = 120.0  # for a whole answer
    max_retries: int = 8  # further attempts of one request, on all replicas together; pauses grow to 15 s
    concurrency: int = 16  # requests under way at once
    tolerance: float = 0.1  # nats by which two replicas, or two answers to the same question, may differ


@dataclass
class TeacherConfig:
    """One specialist: `conf/teachers/<name>.yaml`."""

    path: str = MISSING  # checkpoint folder or hub id; family remote: the server's base URL
    domains: dict[str, float] = field(default_factory=dict)  # domain -> weight; empty: the domain of the teacher's name
    family: str = "deepseek_v4"  # deepseek_v4 | hf | remote
    # How its weights are held. null: FP32, and those of a deepseek_v4 rounded where `model.fp4` rounds the student's |
    # fp32 | bf16 | fp8: matrices of its layers in E4M3 | fp4: MXFP4, experts of a deepseek_v4, matrices of an hf model.
    precision: str | None = None
    # device: weights stay where they are used | host: they stay in host memory | disk: read when the turn comes.
    residency: str = "host"
    default: bool = False  # also serve every domain that has no teacher
    effort: str | None = None  # none | high | max: the mode it was trained in, and its domains must have; null: any
    tokenizer: str | None = None  # null: the one beside `path`
    revision: str | None = None
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # of family remote


@dataclass
class PoolConfig:
    """What the teachers together may take, and what is asked of them before a run."""

    weight_bytes: int | None = None  # most bytes of weights that one teacher host holds; null: no bound
    prefetch: bool = True  # read the next teacher's weights while the present one scores
    hidden_bytes: int | None = None  # of a step's hidden states kept in memory, the rest goes to disk; null: all
    # Of teachers whose scores cannot be right. refuse: the run does not start | warn | off: they are not examined.
    examine: str = "refuse"
    allow_changed: bool = False  # resume with other weights under a teacher's old name
    # For which a step's rollouts are kept and asked about again when no server of a remote teacher answers, after all
    # its max_retries; 0: the run ends at once.
    patience_seconds: float = 600.0


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
    # What is divided among the ranks. 0: nothing | 1: optimizer state | 2: and gradients | 3: and weights (AdamW only).
    zero_stage: int = 0
    precision: str = "fp32"  # fp32 | bf16: what matrices multiply in; masters, sums and the loss stay FP32
    activation_checkpointing: bool = False  # layers are computed again in the backward, and their inside is not kept
    offload_optimizer: bool = False  # AdamW's state in host memory; needs zero_stage 1, 2 or 3
    micro_batch_tokens: int = 8192  # padded tokens of one forward and backward
    grad_clip: float = 1.0  # global norm; 0: off
    max_skipped_steps: int = 10  # in a row, for losses or gradients that are not finite, before the run stops
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Tile of logits: tokens by vocabulary entries. These fit the caches of a CPU; a GPU wants larger ones.
    kl_tile_tokens: int = 512
    kl_tile_vocab: int = 2048
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
    # The same for single phases: rollout (evaluations too), score, train, checkpoint. Example: {rollout: 7200}
    deadlines: dict[str, float] = field(default_factory=dict)
    # Times a stage's actors are started anew after one died or hung, in a row without a checkpoint in between.
    max_restarts: int = 3


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
    checkpoint_every: int = 50  # steps between checkpoints, the last step included; 0: only the last
    # V4's lightning indexer gets no gradient from the loss of its model. This weight is of its own loss, which moves it
    # alone, and which exists where a sequence has more CSA blocks than `index_topk`.
    indexer_loss: float = 1.0
    indexer_dense_steps: int = 0  # the first steps attend to all blocks and compare over all of them (warm-up)
    # Of the loss of multi-token prediction, where the model has the block (model.config.num_nextn_predict_layers=1); a
    # third of it over the steps of `decay_fraction`, as V4's 0.3 and 0.1. Learned from demonstrations only; 0: frozen.
    mtp_weight: float = 0.3


@dataclass
class CorrectionConfig:
    """Factors that carry no gradient, from r = p / mu of each sampled token: p the policy, mu the sampler that drew it.
    Sequence means and products are over a trajectory's loss tokens; a null key is off. See opd.correction."""

    # Importance weights, for losses that are an expectation over the sampled token. none | tis: min(r, high) | mis: r,
    # 0 above high | icepop: r, 0 outside [low, high] | sequence_tis, sequence_mis: with the product of r instead.
    ratio: str = "none"
    low: float = 0.5  # icepop
    high: float = 2.0
    # Masks, for any loss. Each drops what it names.
    max_mean_gap: float | None = None  # trajectories whose |mean log r| is above it (geometric mask) [nats/token]
    max_k3: float | None = None  # trajectories whose mean of r - 1 - log r is above it [nats/token]
    veto: float | None = None  # trajectories with any r below it
    opsm_delta: float | None = None  # V3.2, GRPO: those of negative advantage with a mean of -log r above it [nats]


@dataclass
class GrpoConfig(StageConfig):
    group_size: int = 8
    clip: float = 0.2  # epsilon of the ratio clip
    kl_coefficient: float = 0.0  # beta of V3.2's unbiased KL to the SFT policy; 0: no reference
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)  # masks: the surrogate holds the ratio
    max_staleness: int = 0  # steps that rollouts run ahead of training, under older weights; 0: wait for the newest
    indexer_loss: float = 0.0
    mtp_weight: float = 0.0


@dataclass
class DistillConfig(StageConfig):
    """p is the student, q the teacher, l = log p - log q, y the sampled token, S the teacher's `top_k` likeliest ones.

    A loss is named after the divergence whose gradient it follows. Value of one token, and what it takes:
        reverse_kl                     sum_v p l                                 over the whole vocabulary, exact
        forward_kl                     sum_v -q l                                the same
        mixed_kl                       mix * reverse_kl + (1 - mix) * forward_kl
        jensen_shannon                 beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
        topk_reverse_kl                sum_S (p l - p + q)                       p and q of the whole vocabulary
        topk_renormalised_reverse_kl   KL of p and q both renormalised on S
        topk_tail_reverse_kl           KL over S and one bucket for all the rest
        topk_sampled_reverse_kl        sum_S p l, and l_y if y is not in S:      unbiased for reverse_kl
        topk_forward_kl                sum_S -q l
        sampled_reverse_kl             score function of l_y (policy gradient):  unbiased for reverse_kl
        sampled_reverse_kl_k2          l_y^2 / 2, differentiated:                unbiased for reverse_kl
        sampled_forward_kl             q/p - 1 + l_y (k3), differentiated:       unbiased for forward_kl
    The first four need teachers whose hidden states are here; the others work with `family: remote` too.
    """

    loss: str = "reverse_kl"
    mix: float = 0.5  # mixed_kl
    beta: float = 0.5  # jensen_shannon, above 0 and below 1
    top_k: int = 64  # topk_*
    advantage_clip: float | None = None  # sampled_reverse_kl: bound of |l_y|, nats; null: none
    baseline: str = "none"  # sampled_reverse_kl: none | kl (the exact KL of the state, which lowers the variance)
    kl_temperature: float = 1.0  # tau: both logits are divided by it
    reference_kl: float = 0.0  # coefficient of the exact KL(p || p_0), p_0 the policy the stage starts from
    masked_ids: list[int] = field(default_factory=list)  # sampled tokens that do not count, as special tokens may not
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    hidden_dtype: str = "bfloat16"  # bfloat16 | float32: how the teachers' hidden states are stored and sent
    max_staleness: int = 0  # steps that rollouts run ahead of training, under older weights; 0: wait for the newest
    indexer_loss: float = 0.0
    mtp_weight: float = 0.0


@dataclass
class StagesConfig:
    base: StageConfig = field(default_factory=StageConfig)
    sft: StageConfig = field(default_factory=StageConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class CheckpointConfig:
    """Which checkpoints of a stage stay. The newest one always does: it is what the stage's `hf` points at."""

    keep_last: int = 2
    keep_best: int = 0  # of those written at an evaluation, which then all are
    best_metric: str = "eval/pass_at_1"  # larger is better; of a group of metrics, as this one, the mean counts


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
    # auto: go on where the run of this name stopped, or begin it | a checkpoint's folder (.../checkpoints/step_<n>): go
    # on from there | null: begin.
    resume: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    pool: PoolConfig = field(default_factory=PoolConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
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
                effort = config.data.domains[domain].effort
                if teacher.effort not in (None, effort):
                    raise ConfigError(
                        f"teachers.{name}.effort={teacher.effort} does not fit data.domains.{domain}.effort={effort}, "
                        "in which its prompts are rendered; give them the same, or effort: null to a teacher of any"
                    )
                routes[domain].append((name, weight))
    defaults = [name for name, teacher in config.teachers.items() if teacher.default]
    if len(defaults) > 1:
        raise ConfigError(f"teachers.*.default is true for {', '.join(defaults)}; at most one may be the default")
    for domain, served_by in routes.items():
        fits = defaults and config.teachers[defaults[0]].effort in (None, config.data.domains[domain].effort)
        if not served_by and fits:
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
        _check_teacher(f"teachers.{name}", teacher)
    _check_pool(config)
    _check_rollout(config)
    _check_learner(config.learner, config.model.max_tokens)
    _check_runtime(config)
    for stage in ("base", "sft", "grpo", "distill"):
        _check_stage(f"stages.{stage}", getattr(config.stages, stage))
    _check_sources(config)
    at_least("tokenizer.vocab_size", config.tokenizer.vocab_size, 300)
    at_least("tokenizer.samples_per_domain", config.tokenizer.samples_per_domain, 1)
    _check_checkpoint(config)
    at_least("eval.samples", config.eval.samples, 0)
    at_least("eval.inline_prompts", config.eval.inline_prompts, 1)
    above("eval.temperature", config.eval.temperature, 0)
    _check_temperature("eval.temperature", config.eval.temperature)
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
    lora = model.lora
    at_least("model.lora.rank", lora.rank, 0)
    above("model.lora.alpha", lora.alpha, 0)
    if lora.rank == 0:
        unset("model.lora.alpha", lora.alpha, LoraConfig().alpha, "model.lora.rank is 0")
        unset("model.lora.targets", list(lora.targets), [], "model.lora.rank is 0")
    elif model.family != "hf":
        raise ConfigError(f"model.lora.rank={lora.rank} needs model.family=hf; with family={model.family} it must be 0")
    elif model.fp4 != "none":
        raise ConfigError(
            f"model.lora.rank={lora.rank} with model.fp4={model.fp4} cannot work: the sum of weight and adapter would "
            "have to be rounded, not the weight alone; use fp4=none or rank=0"
        )


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


def _check_teacher(key: str, teacher: TeacherConfig) -> None:
    one_of(f"{key}.family", teacher.family, ("deepseek_v4", "hf", "remote"))
    one_of(f"{key}.residency", teacher.residency, ("device", "host", "disk"))
    one_of(f"{key}.precision", teacher.precision, (None, "fp32", "bf16", "fp8", "fp4"))
    one_of(f"{key}.effort", teacher.effort, (None, *EFFORTS))
    remote, plain = teacher.remote, RemoteConfig()
    if teacher.family != "remote":
        for entry in fields(remote):
            value, default = getattr(remote, entry.name), getattr(plain, entry.name)
            unset(f"{key}.remote.{entry.name}", value, default, f"it does not belong to family={teacher.family}")
        return
    one_of(f"{key}.remote.server", remote.server, ("vllm", "sglang"))
    for name, url in ((f"{key}.path", teacher.path), *((f"{key}.remote.replicas", url) for url in remote.replicas)):
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url):
            shown = re.sub(r"//.*@", "//***@", url)
            raise ConfigError(
                f"{name}={shown} is not the base URL of a server, such as http://host:8000/v1; a key belongs into the "
                f"environment variable that {key}.remote.api_key_env names"
            )
    if teacher.tokenizer is None:
        raise ConfigError(
            f"{key}.tokenizer is null; family=remote needs the folder or hub id of the tokenizer that the server uses, "
            "to be compared with the student's"
        )
    for setting, value in (("precision", teacher.precision), ("revision", teacher.revision)):
        unset(f"{key}.{setting}", value, None, "a remote teacher's weights are its server's business")
    for setting, lowest in (("top_k", 0), ("max_retries", 0), ("concurrency", 1), ("tolerance", 0)):
        at_least(f"{key}.remote.{setting}", getattr(remote, setting), lowest)
    above(f"{key}.remote.timeout_seconds", remote.timeout_seconds, 0)
    if remote.server == "sglang":
        unset(f"{key}.remote.model", remote.model, None, "a server of sglang has one model")


def _check_pool(config: Config) -> None:
    at_least("pool.weight_bytes", config.pool.weight_bytes, 1)
    at_least("pool.hidden_bytes", config.pool.hidden_bytes, 0)
    at_least("pool.patience_seconds", config.pool.patience_seconds, 0)
    one_of("pool.examine", config.pool.examine, ("refuse", "warn", "off"))
    limit = config.runtime.deadlines.get("score", config.runtime.timeout_seconds)
    for name, teacher in config.teachers.items():
        remote = teacher.remote
        longest = (remote.max_retries + 1) * remote.timeout_seconds
        if teacher.family == "remote" and longest >= limit:
            raise ConfigError(
                f"teachers.{name}.remote: {remote.max_retries} max_retries after a first attempt, each of "
                f"timeout_seconds={remote.timeout_seconds:g}, take {longest:g} s, and after {limit:g} s a teacher host "
                "is taken for hanging (runtime.deadlines: {score: ...}, or runtime.timeout_seconds)"
            )


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
        unset("rollout.routing_replay", rollout.routing_replay, False, "what model.family=hf routes is not recorded")
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
    one_of("learner.zero_stage", learner.zero_stage, (0, 1, 2, 3))
    one_of("learner.precision", learner.precision, ("fp32", "bf16"))
    one_of("learner.optimizer.name", optimizer.name, ("muon", "adamw"))
    for key, value, lowest in (
        ("num_ranks", learner.num_ranks, 1),
        ("micro_batch_tokens", learner.micro_batch_tokens, max_tokens),
        ("grad_clip", learner.grad_clip, 0),
        ("max_skipped_steps", learner.max_skipped_steps, 1),
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
    check_zero(learner)


def check_zero(learner: LearnerConfig) -> None:
    """Raises ConfigError for an optimizer that cannot be divided as `zero_stage` says."""
    stage, name = learner.zero_stage, learner.optimizer.name
    if stage == 3 and name == "muon":
        raise ConfigError(
            "learner.zero_stage=3 with learner.optimizer.name=muon cannot work: stage 3 divides each weight among the "
            "ranks, and Muon needs whole matrices; use zero_stage 0, 1 or 2, or optimizer.name=adamw"
        )
    if learner.offload_optimizer and (stage == 0 or name == "muon"):
        raise ConfigError(
            f"learner.offload_optimizer=true with learner.zero_stage={stage} and learner.optimizer.name={name} cannot "
            "work: it is ZeRO that moves AdamW's state to host memory; use zero_stage 1, 2 or 3 with "
            "optimizer.name=adamw"
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
    for phase, seconds in runtime.deadlines.items():
        one_of("runtime.deadlines: the phase", phase, ("rollout", "score", "train", "checkpoint"))
        above(f"runtime.deadlines.{phase}", seconds, 0)
    at_least("runtime.max_restarts", runtime.max_restarts, 0)
    if runtime.kind == "local":
        if config.learner.num_ranks != 1:
            raise ConfigError(
                f"learner.num_ranks={config.learner.num_ranks} needs one process per rank; use runtime=ray or "
                "num_ranks=1"
            )
        unset("runtime.address", runtime.address, None, "runtime.kind=local joins no cluster")
        for stage in ("grpo", "distill"):
            ahead = getattr(config.stages, stage).max_staleness
            if ahead > 0:
                raise ConfigError(
                    f"stages.{stage}.max_staleness={ahead} needs workers that sample while the learner trains, and "
                    "runtime.kind=local does one thing after another; use runtime=ray or max_staleness=0"
                )


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
    at_least("checkpoint.keep_best", checkpoint.keep_best, 0)
    best = checkpoint.best_metric
    if not re.fullmatch(r"eval/pass_at_1(/.+)?", best):
        raise ConfigError(
            f"checkpoint.best_metric={best} is not a metric to choose by; it must be eval/pass_at_1 (the mean over "
            "domains) or eval/pass_at_1/<domain>"
        )
    domain = best.removeprefix("eval/pass_at_1").removeprefix("/")
    if domain and domain not in config.data.domains:
        raise ConfigError(
            f"checkpoint.best_metric={best} names an unknown domain; data.domains has: {', '.join(config.data.domains)}"
        )
    if checkpoint.keep_best == 0:
        unset("checkpoint.best_metric", best, CheckpointConfig().best_metric, "checkpoint.keep_best is 0")
    elif not any(getattr(config.stages, stage).eval_every for stage in ("base", "sft", "grpo", "distill")):
        raise ConfigError(
            f"checkpoint.keep_best={checkpoint.keep_best} has nothing to choose by: no stage evaluates; set "
            "stages.<stage>.eval_every"
        )
    if config.resume is not None and config.run.overwrite:
        raise ConfigError(
            f"resume={config.resume} goes on with a run and run.overwrite=true replaces it; choose one of the two"
        )


def _check_temperature(key: str, value: float) -> None:
    """One that is not 0 must leave logits finite, and different."""
    if value and not 1e-3 <= value <= 1e3:
        raise ConfigError(f"{key}={value} is not in [0.001, 1000], and not 0 where greedy sampling is meant")


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
    _check_temperature(f"{key}.temperature", stage.temperature)
    if isinstance(stage, GrpoConfig | DistillConfig):
        unset(f"{key}.mtp_weight", stage.mtp_weight, 0.0, "multi-token prediction learns from demonstrations only")
    match stage:
        case GrpoConfig():
            above(f"{key}.clip", stage.clip, 0)
            at_least(f"{key}.max_staleness", stage.max_staleness, 0)
            at_least(f"{key}.kl_coefficient", stage.kl_coefficient, 0)
            _check_correction(f"{key}.correction", stage.correction, "GRPO's surrogate holds the ratio itself")
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
            _check_loss(key, stage)
            above(f"{key}.kl_temperature", stage.kl_temperature, 0)
            _check_temperature(f"{key}.kl_temperature", stage.kl_temperature)
            at_least(f"{key}.reference_kl", stage.reference_kl, 0)
            for index, token_id in enumerate(stage.masked_ids):
                at_least(f"{key}.masked_ids[{index}]", token_id, 0)
            at_least(f"{key}.max_staleness", stage.max_staleness, 0)
            one_of(f"{key}.hidden_dtype", stage.hidden_dtype, ("bfloat16", "float32"))
        case _:
            for setting, default in (("group_size", 1), ("temperature", 1.0)):
                unset(f"{key}.{setting}", getattr(stage, setting), default, "demonstrations are not sampled")


def _check_loss(key: str, stage: DistillConfig) -> None:
    plain, loss = DistillConfig(), stage.loss
    one_of(f"{key}.loss", loss, (*FULL_LOSSES, *TOPK_LOSSES, *SAMPLED_LOSSES))
    for setting, losses in (
        ("mix", ("mixed_kl",)),
        ("beta", ("jensen_shannon",)),
        ("top_k", TOPK_LOSSES),
        ("advantage_clip", ("sampled_reverse_kl",)),
        ("baseline", ("sampled_reverse_kl",)),
    ):
        if loss not in losses:
            unset(f"{key}.{setting}", getattr(stage, setting), getattr(plain, setting), f"{key}.loss={loss} has none")
    within(f"{key}.mix", stage.mix, 0, 1)
    if not 0 < stage.beta < 1:
        raise ConfigError(f"{key}.beta={stage.beta} is not in (0, 1); at the ends choose loss=forward_kl or reverse_kl")
    at_least(f"{key}.top_k", stage.top_k, 1)
    if stage.advantage_clip is not None:
        above(f"{key}.advantage_clip", stage.advantage_clip, 0)
    one_of(f"{key}.baseline", stage.baseline, ("none", "kl"))
    is_sampled = loss in SAMPLED_LOSSES or loss == "topk_sampled_reverse_kl"
    why = None if is_sampled else f"{key}.loss={loss} is no expectation over the sampled token, so it has no ratio"
    _check_correction(f"{key}.correction", stage.correction, why)
    unset(f"{key}.correction.opsm_delta", stage.correction.opsm_delta, None, "only GRPO's advantages have a sign")
    if stage.steps > 0 and is_sampled and stage.temperature != stage.kl_temperature:
        raise ConfigError(
            f"{key}.temperature={stage.temperature} and {key}.kl_temperature={stage.kl_temperature} must be equal for "
            f"loss={loss}: its tokens must be drawn from the distribution whose divergence it estimates"
        )
    if stage.steps > 0 and _has_ratio(stage.correction) and stage.temperature == 0:
        raise ConfigError(f"{key}.temperature=0 cannot work with {key}.correction: greedy tokens have no ratio")


def _check_correction(key: str, correction: CorrectionConfig, no_ratio: str | None) -> None:
    """`no_ratio`: why importance weights make no sense here, if they do not."""
    plain = CorrectionConfig()
    one_of(f"{key}.ratio", correction.ratio, ("none", "tis", "mis", "icepop", "sequence_tis", "sequence_mis"))
    if no_ratio is not None:
        unset(f"{key}.ratio", correction.ratio, "none", no_ratio)
    if correction.ratio == "none":
        unset(f"{key}.high", correction.high, plain.high, f"{key}.ratio=none has no bounds")
    if correction.ratio != "icepop":
        unset(f"{key}.low", correction.low, plain.low, "only ratio=icepop has a lower bound")
    above(f"{key}.low", correction.low, 0)
    above(f"{key}.high", correction.high, correction.low)
    for setting in ("max_mean_gap", "max_k3", "veto", "opsm_delta"):
        at_least(f"{key}.{setting}", getattr(correction, setting), 0)


def _has_ratio(correction: CorrectionConfig) -> bool:
    """Whether anything of it compares policy and sampler."""
    return correction != CorrectionConfig()


def _check_sources(config: Config) -> None:
    """What a distillation loss asks of its teachers and of the sampler."""
    stage, sampling = config.stages.distill, config.rollout.sampling
    if stage.steps == 0:
        return
    for name, teacher in config.teachers.items():
        if teacher.family != "remote":
            continue
        if stage.loss in FULL_LOSSES or stage.baseline == "kl":
            setting = f"loss={stage.loss}" if stage.loss in FULL_LOSSES else f"baseline={stage.baseline}"
            raise ConfigError(
                f"stages.distill.{setting} needs hidden states, and teachers.{name}.family=remote sends "
                f"log-probabilities; choose one of {', '.join((*TOPK_LOSSES, *SAMPLED_LOSSES))} without a baseline"
            )
        if stage.loss in TOPK_LOSSES and teacher.remote.top_k < stage.top_k:
            raise ConfigError(
                f"teachers.{name}.remote.top_k={teacher.remote.top_k} is too small; stages.distill.loss={stage.loss} "
                f"needs stages.distill.top_k={stage.top_k} of it"
            )
        if stage.kl_temperature != 1.0:
            raise ConfigError(
                f"stages.distill.kl_temperature={stage.kl_temperature} must be 1.0: the log-probabilities that "
                f"teachers.{name}.family=remote sends are those of temperature 1"
            )
    truncates = sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0
    is_sampled = stage.loss in SAMPLED_LOSSES or stage.loss == "topk_sampled_reverse_kl"
    if truncates and (is_sampled or _has_ratio(stage.correction)):
        setting = f"loss={stage.loss}" if is_sampled else "correction"
        raise ConfigError(
            f"rollout.sampling.top_p={sampling.top_p}, min_p={sampling.min_p} and top_k={sampling.top_k} must be off "
            f"(1.0, 0 and 0) with stages.distill.{setting}: it compares untruncated distributions on sampled tokens"
        )
