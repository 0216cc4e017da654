"""Where numbers go: one JSON line per step, Weights & Biases, and a line on the terminal.

`<run>/metrics.jsonl` is the record that everything else (report, tests, a resumed run) reads; it is written first and
flushed, and nothing that happens to Weights & Biases can lose it. Names and units of all numbers are in `CATALOGUE`.

Three rules of the record. A value that is not finite is written as null, with "nan", "inf" or "-inf" under
"<key>/nonfinite", so each line is strict JSON and the event is not lost. A line cut off by a crash is dropped when the
run goes on. A resumed run writes the steps after its checkpoint again: the later line of a step counts.

This is the only file that imports wandb, and it does so only when tracking is not disabled. What it leaves out:
judging the numbers (`opd.health`) and drawing them (`opd.report`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from opd.config import ConfigError, TrackingConfig

LOGGER = logging.getLogger(__name__)

RECORD_KEYS = ("step", "stage", "time", "domain")  # of a line itself; no metric may have such a name

# Pattern -> meaning [unit]. <domain> and <teacher> stand for one name. Sums are over the whole step, all ranks.
CATALOGUE: dict[str, str] = {
    "train/loss": "objective of the stage, per loss token [nats, or GRPO's surrogate]",
    "train/grad_norm": "global gradient norm before clipping",
    "train/lr": "learning rate of this step",
    "train/skipped_steps": "optimizer steps of this stage skipped so far because a gradient was not finite [count]",
    "train/tokens": "loss tokens of this step [tokens]",
    "train/balance_loss": "V4's sequence-wise expert balance loss, mean of rows, before its coefficient",
    "train/index_loss": "KL of the indexers from attention, mean of rows and CSA layers, nats, before its weight",
    "train/index_recall": "attention mass of the entries the indexers pick over that of the best ones, sampled queries",
    "train/load_imbalance": "largest expert load of a layer over that layer's mean, worst layer; 0 for dense models",
    "sft/nll/<domain>": "minus the log-probability of demonstrated tokens, mean [nats/token]",
    "sft/entropy/<domain>": "entropy of the policy's next-token distribution on demonstrations, mean [nats/token]",
    "sft/mtp_nll": "the same by the multi-token-prediction block, from one token less, all domains [nats/token]",
    "distill/reverse_kl": "KL(student || teacher) over the whole vocabulary, whatever the loss (remote teachers: its "
    "estimate from the sampled tokens), mean of loss tokens [nats/token]",
    "distill/reverse_kl/<domain>": "the same, tokens of one domain [nats/token]",
    "distill/kl_max/<domain>": "largest KL(student || teacher) of one token [nats]",
    "distill/student_entropy/<domain>": "entropy of the student's next-token distribution, mean [nats/token]",
    "distill/teacher_entropy/<domain>": "entropy of the teacher's next-token distribution, mean [nats/token]",
    "distill/top1_agreement/<domain>": "share of positions where student and teacher have the same arg-max [0-1]",
    "distill/top16_overlap/<domain>": "share of the student's 16 likeliest tokens that are also the teacher's, mean of "
    "up to 64 tokens of a micro-batch [0-1]",
    "distill/kl_to_reference/<domain>": "KL(student || the policy that distillation started from) [nats/token]",
    "distill/topk_student_mass/<domain>": "probability of the teacher's top k tokens under the student, mean [0-1]",
    "distill/topk_teacher_mass/<domain>": "the same under the teacher; low means that k is too small [0-1]",
    "distill/advantage_clip_share/<domain>": "share of tokens whose |log p - log q| is above advantage_clip [0-1]",
    "distill/special_share/<domain>": "share of tokens that do not count because of masked_ids [0-1]",
    "distill/ratio_truncated_share/<domain>": "share of tokens whose importance weight was cut to its bound [0-1]",
    "distill/ratio_masked_share/<domain>": "share of tokens whose importance weight lies out of bounds, now 0 [0-1]",
    "distill/geometric_share/<domain>": "share of tokens in trajectories dropped by correction.max_mean_gap [0-1]",
    "distill/k3_share/<domain>": "share of tokens in trajectories dropped by correction.max_k3 [0-1]",
    "distill/veto_share/<domain>": "share of tokens in trajectories dropped by correction.veto [0-1]",
    "distill/head_loads": "teacher heads loaded for this step; equals the number of distinct teachers [count]",
    "teacher/<teacher>/tokens": "loss tokens this teacher scored [tokens]",
    "teacher/<teacher>/token_share": "its share of all scored tokens [0-1]",
    "teacher/<teacher>/reverse_kl": "KL(student || this teacher), mean of its tokens [nats/token]",
    "teacher/<teacher>/student_entropy": "entropy of the student where this teacher judges it, mean [nats/token]",
    "teacher/<teacher>/teacher_entropy": "entropy of the teacher there (remote teachers: not known) [nats/token]",
    "teacher/<teacher>/top16_overlap": "share of the 16 likeliest tokens that both have there [0-1]",
    "teacher/<teacher>/score_seconds": "time it took to score [s]",
    "teacher/<teacher>/load_seconds": "time to bring its weights into memory [s]",
    "teacher/<teacher>/wait_seconds": "the part of it that scoring had to wait for [s]",
    "teacher/<teacher>/entropy_share": "its entropy at probed tokens over that of the uniform distribution, mean [0-1]",
    "teacher/<teacher>/repeat_error": "difference of its log-sum-exps when asked the same twice, largest [nats]",
    "gap/k1": "mean of log mu - log p on sampled tokens, mu the sampler before truncation, p the learner [nats/token]",
    "gap/k3": "mean of r - 1 - log r with r = p / mu, never negative [nats/token]",
    "gap/max_logprob_gap": "largest |log p - log mu| of one token [nats]",
    "gap/ess": "effective sample size of the weights r, as a share of the tokens [0-1]",
    "gap/outside_share": "share of tokens whose r lies outside [0.5, 2] [0-1]",
    "gap/mean_ratio": "mean of r = p / mu",
    "gap/rerouted_share": "share of tokens and learned layers at which the learner's router would choose other experts "
    "than the sampler's, which routing replay gives it [0-1]",
    "rollout/tokens": "tokens sampled in this step [tokens]",
    "rollout/mean_length": "mean completion length [tokens]",
    "rollout/staleness": "versions between a token's weights and those that learn from it, mean of loss tokens [count]",
    "rollout/max_staleness": "the same, oldest loss token [count]",
    "rollout/max_length": "longest completion [tokens]",
    "rollout/truncated_share": "share of completions cut at the length limit [0-1]",
    "rollout/mean_length/<domain>": "mean completion length of one domain [tokens]",
    "rollout/truncated_share/<domain>": "share of one domain's completions cut at the length limit [0-1]",
    "reward/mean": "mean reward of this step's rollouts",
    "reward/mean/<domain>": "mean reward of one domain's rollouts",
    "reward/pass_rate/<domain>": "share of one domain's rollouts the verifier accepts [0-1]",
    "reward/verifier_errors": "answers on which the verifier itself failed in this step [count]",
    "grpo/entropy/<domain>": "entropy of the policy's next-token distribution on its rollouts, mean [nats/token]",
    "grpo/clip_share": "share of tokens whose ratio was clipped [0-1]",
    "grpo/kl_to_reference": "KL(policy || reference), unbiased estimate [nats/token]",
    "grpo/geometric_share/<domain>": "share of tokens in trajectories dropped by correction.max_mean_gap [0-1]",
    "grpo/k3_share/<domain>": "share of tokens in trajectories dropped by correction.max_k3 [0-1]",
    "grpo/veto_share/<domain>": "share of tokens in trajectories dropped by correction.veto [0-1]",
    "grpo/opsm_share/<domain>": "share of tokens in trajectories dropped by correction.opsm_delta [0-1]",
    "grpo/zero_advantage_share": "share of groups whose rewards are all equal and so teach nothing [0-1]",
    "fp4/changed_code_share": "share of FP4 codes that changed since the last publish [0-1]",
    "eval/pass_at_1/<domain>": "greedy accuracy on held-out prompts [0-1]",
    "eval/pass_at_k/<domain>": "share of held-out prompts with at least one correct answer among k samples [0-1]",
    "eval/mean_length/<domain>": "mean length of the evaluation's completions [tokens]",
    "phase/rollout_seconds": "time of this step spent generating [s]",
    "phase/score_seconds": "time of this step spent in teachers or verifiers [s]",
    "phase/train_seconds": "time of this step spent in forward, backward and update [s]",
    "phase/publish_seconds": "time of this step spent sending new weights to the samplers [s]",
    "phase/evaluate_seconds": "time of this step spent evaluating [s]",
    "phase/checkpoint_seconds": "time of this step spent writing a checkpoint [s]",
    "phase/total_seconds": "time of the whole step [s]",
    "perf/tokens_per_second": "trained tokens over the whole step's time [tokens/s]",
    "perf/rollout_tokens_per_second": "sampled tokens over generation time [tokens/s]",
    "policy/version": "version of the policy after this step [count]",
}

# What the terminal shows of a stage: (key, label, format), in order; a key that a step does not log is left out.
_SHOWN: dict[str, tuple[tuple[str, str, str], ...]] = {
    "grpo": (
        ("reward/mean", "reward", ".3f"),
        ("rollout/mean_length", "length", ".1f"),
        ("perf/tokens_per_second", "tokens/s", ",.0f"),
    ),
    "distill": (
        ("distill/reverse_kl", "reverse KL", ".4f"),
        ("rollout/mean_length", "length", ".1f"),
        ("perf/tokens_per_second", "tokens/s", ",.0f"),
    ),
}
_SHOWN_OTHERWISE = (("train/loss", "loss", ".4f"), ("perf/tokens_per_second", "tokens/s", ",.0f"))

_SECRET_KEY = re.compile(r"(^|[._-])(api_?key|secret|password|passwd|(access|auth|hf|bearer)_token|credentials)$", re.I)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")

_WANDB_START_SECONDS = 30.0  # longest wait for the server when online
_WANDB_FINISH_SECONDS = 60.0  # longest wait for the upload when a run ends


def describe(key: str) -> str | None:
    """The catalogue's line for a metric key, or None for a key it does not have."""
    parts = key.split("/")
    for pattern, meaning in CATALOGUE.items():
        names = pattern.split("/")
        # A domain or teacher may have slashes in its name, so a placeholder takes one part or more.
        regex = "/".join(".+" if name.startswith("<") else re.escape(name) for name in names)
        if len(parts) >= len(names) and re.fullmatch(regex, key):
            return meaning
    return None


def redact(value: Any, key: str = "") -> Any:
    """A copy of a nested configuration in which secrets are "***": values under keys named like one, and passwords
    inside URLs."""
    if isinstance(value, Mapping):
        return {name: redact(child, str(name)) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact(child, key) for child in value]
    if value is not None and _SECRET_KEY.search(key):
        return "***"
    return _URL_PASSWORD.sub("***", value) if isinstance(value, str) else value


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first.

    An incomplete last line (a crash cut it) is left out. Raises ValueError for any other line that is not a JSON
    object, naming file and line, and FileNotFoundError.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # the part after the last newline is empty or torn
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is {type(record).__name__}; a metrics line is a JSON object")
        records.append(record)
    return records


class Metrics:
    """The numbers of one stage of one run.

    `config` is the resolved configuration: it is stored with the W&B run (secrets redacted), its run.name is the W&B
    group (else the name of `run_dir`), and its `domain`, if set, is written to each line. `tracking.wandb` decides the
    W&B mode; the environment variable WANDB_MODE never does, and a warning says so when the two differ. The other
    variables of W&B (WANDB_BASE_URL, WANDB_ENTITY, ...) hold where the configuration says nothing. With the `wandb_id`
    of an earlier part of the stage the W&B run is the same one, which keeps what it had of steps that come again.

    Online tracking that can not start raises ConfigError. Offline tracking that can not start, and either kind when it
    fails later, costs a warning. Offline tracking opens no connection.
    """

    def __init__(
        self,
        run_dir: str,
        tracking: TrackingConfig,
        config: dict[str, Any],
        stage: str,
        total_steps: int,
        quiet: bool = False,
        wandb_id: str | None = None,
    ) -> None:
        os.makedirs(run_dir, exist_ok=True)
        self.path = os.path.join(run_dir, "metrics.jsonl")
        self._stage = stage
        self._domain: str | None = config.get("domain")
        self._wandb = None if tracking.wandb == "disabled" else _start_wandb(run_dir, tracking, config, stage, wandb_id)
        self.wandb_id: str | None = wandb_id if self._wandb is None else self._wandb.id
        self._file = _open_to_append(self.path)
        label = stage if self._domain is None else f"{stage} {self._domain}"
        self._progress = None if quiet else _ProgressLine(label, stage, total_steps)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of one step; a step may be logged in several calls. Raises ValueError for a name that a
        line itself uses, and TypeError for a value that is no number."""
        record: dict[str, Any] = {"step": step, "stage": self._stage, "time": round(time.time(), 3)}
        if self._domain is not None:
            record["domain"] = self._domain
        numbers: dict[str, float] = {}
        for key, value in values.items():
            if key in RECORD_KEYS:
                raise ValueError(f"metric {key!r} has a reserved name; reserved: {', '.join(RECORD_KEYS)}")
            number = value if type(value) is int else float(value)  # also numpy scalars and one-element tensors
            numbers[key] = number
            record[key] = number if math.isfinite(number) else None
            if record[key] is None:
                record[f"{key}/nonfinite"] = str(number)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            try:
                self._wandb.log(numbers, step=step)
            except Exception as error:  # its helper process is gone; see _start_wandb
                LOGGER.warning(
                    "W&B stopped at step %d (%r); the run goes on, %s has everything", step, error, self.path
                )
                self._wandb = None
        if self._progress is not None:
            self._progress.show(step, numbers)

    def close(self, exit_code: int = 0) -> None:
        """Ends the record; a second call does nothing. With an exit code other than 0 the W&B run shows as failed."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=exit_code)
            except Exception as error:
                LOGGER.warning("W&B did not finish (%r); %s has everything", error, self.path)
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def _open_to_append(path: str) -> IO[str]:
    """Opens the record for appending, without the torn line that a crash may have left at its end."""
    if os.path.exists(path):
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def _start_wandb(
    run_dir: str, tracking: TrackingConfig, config: dict[str, Any], stage: str, wandb_id: str | None
) -> Any:
    """A started W&B run, or None (after a warning) when offline tracking can not start."""
    online = tracking.wandb == "online"
    instead = "Or choose tracking.wandb=offline and upload later with `wandb sync`, or tracking.wandb=disabled"
    in_environment = os.environ.get("WANDB_MODE")
    if in_environment and in_environment != tracking.wandb:
        LOGGER.warning("WANDB_MODE=%s is ignored: tracking.wandb=%s decides", in_environment, tracking.wandb)
    # W&B's crash reporting looks up its server even when offline; an explicit choice of the user's stays.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        if online:
            raise ConfigError(f"tracking.wandb=online needs the package wandb ({error}). {instead}") from error
        LOGGER.warning("W&B is not installed (%s); the run goes on without it", error)
        return None
    domain = config.get("domain")
    run_config = config.get("run")
    name = run_config.get("name") if isinstance(run_config, Mapping) else None
    try:
        wandb.setup(wandb.Settings(silent=True, mode="online" if online else "offline"))
        if online and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "tracking.wandb=online found no W&B API key. Set WANDB_API_KEY or run `wandb login` once. " + instead
            )
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            mode="online" if online else "offline",
            id=wandb_id,
            resume="allow" if online and wandb_id else None,  # offline, runs of one id are joined when they are synced
            dir=run_dir,
            group=name or os.path.basename(os.path.abspath(run_dir)),
            job_type=stage,
            name=f"{stage}-{domain}" if domain else stage,
            config=redact(config),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=_WANDB_START_SECONDS,
                finish_timeout=_WANDB_FINISH_SECONDS,
            ),
        )
    except ConfigError:
        raise
    except Exception as error:  # what wandb raises when its helper process or server fails has no common base
        if online:
            raise ConfigError(
                f"tracking.wandb=online can not start: {error!r}. Check the network, WANDB_API_KEY, "
                f"tracking.entity={tracking.entity} and tracking.project={tracking.project}. {instead}"
            ) from error
        LOGGER.warning("W&B can not start offline (%r); the run goes on without it", error)
        return None


class _ProgressLine:
    """One updating line on a terminal; elsewhere a log line at the first step, about every tenth, and the last."""

    def __init__(self, label: str, stage: str, total_steps: int) -> None:
        self._label = label
        self._shown = _SHOWN.get(stage, _SHOWN_OTHERWISE)
        self._total = total_steps
        self._numbers: dict[str, float] = {}
        self._ends: deque[tuple[int, float]] = deque(maxlen=20)  # step, when it ended
        self._printed: int | None = None  # tenth of the stage that has had its line
        self._bar: Progress | None = None
        self._redirected: list[logging.StreamHandler[Any]] = []
        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
                auto_refresh=False,
            )
            terminal = sys.stderr
            self._bar.start()
            self._task = self._bar.add_task(label, total=total_steps, numbers="")
            # The bar stands in for sys.stderr so that other lines go above it; earlier handlers hold the old one.
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                    handler.setStream(sys.stderr)
                    self._redirected.append(handler)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        self._numbers.update(numbers)
        if not self._ends or self._ends[-1][0] != step:
            self._ends.append((step, time.monotonic()))
        if self._bar is not None:
            self._bar.update(self._task, completed=min(step, self._total), numbers=self._text(), refresh=True)
            return
        tenth = 10 * step // max(self._total, 1)
        if self._printed is None or tenth > self._printed:
            self._printed = tenth
            LOGGER.info("%s %d/%d  %s", self._label, step, self._total, self._text())

    def _text(self) -> str:
        texts = [f"{label} {self._numbers[key]:{form}}" for key, label, form in self._shown if key in self._numbers]
        accuracies = [value for key, value in self._numbers.items() if key.startswith("eval/pass_at_1/")]
        if accuracies:
            texts.append(f"accuracy {sum(accuracies) / len(accuracies):.3f}")
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        if last > first and last < self._total:
            left = round((self._total - last) * (ended - began) / (last - first))
            texts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return "  ".join(texts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            for handler in self._redirected:
                handler.setStream(sys.stderr)
