"""Rules that watch the numbers of a run and say, in words, what goes wrong and what to do about it.

One `Health` follows one stage: give it each step's metrics and it returns what it found. Each rule is a plain
function of (this step's values, what came before, the thresholds); `Health.check` lists them all. Every message has the
numbers seen, the threshold, and a next step. `check_recovery` judges the final evaluation the same way.

The file is long because each rule carries its whole message. What it leaves out: refusing bad input (tokenizers, heads
and FP4 sync are checked where they are used) and acting on a finding: a rule never changes a run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]


@dataclass(slots=True, kw_only=True, frozen=True)
class Finding:
    """`rule` is stable and fit for a filter; `subject` is the domain, teacher or metric it speaks of, or ""."""

    rule: str
    severity: Severity
    message: str
    subject: str = ""


@dataclass(slots=True, kw_only=True, frozen=True)
class Levels:
    """All thresholds. "Ours" marks a choice made here for want of a published number."""

    repeat_steps: int = 20  # ours: the same finding is told at most this often
    window: int = 20  # ours: steps that "flat" and "low" must last, and over which medians are taken
    baseline: int = 3  # ours: first values averaged into "initial"
    smoothing: int = 5  # ours: steps averaged into "now", against the noise of small rollout batches

    distant_kl: float = 0.1  # nats/token; 0.04 at first with teachers of one origin, 0.19 with another (2606.30406)
    taught_agreement: float = 0.9  # successful OPD ends above 91% overlap (2604.13016); here of the arg-max alone
    taught_kl: float = 0.01  # nats/token: below it the signal is close to the noise of rounding and sampling
    recovery_flat: float = 0.02  # ours: accuracy gained in `window` steps that still counts as flat
    stall_share: float = (
        0.5  # ours: a KL above this share of its start has not been learnt; 2604.13016: flat throughout
    )
    stall_agreement: float = 0.005  # ours: change of agreement within `window` that counts as flat
    stall_entropy: float = 0.02  # ours: change of the entropy gap within `window` that counts as flat, nats/token
    stall_kl: float = 0.05  # ours: relative change of the KL within `window` that counts as flat
    stall_grad_norm: float = 1.0  # ours: below the usual clip, so clipping is not what holds the policy back
    truncation_rise: float = 0.15  # onset of the length collapse in Luo et al., arXiv 2604.08527 ...
    truncation_rise_steps: int = 10  # ... which takes about 30 steps from stable to all truncated
    truncation_high: float = 0.3  # above it the teacher hardly ever scores a stop
    entropy_share: float = 0.5  # of the initial entropy; reverse KL seeks modes, and pass@k goes before pass@1
    entropy_share_of_teacher: float = 0.25  # ours: healthy students of a small model end at 0.4 to 0.5 of the teacher's
    hacking_kl_fall: float = 0.2  # ours: relative fall of the KL ...
    hacking_accuracy_fall: float = 0.1  # ... while accuracy falls by this much from its best (Fu et al., 2603.25562)

    ratio_low: float = 0.5  # mean p / mu: verl's alarm levels, for this and the next three
    ratio_high: float = 2.0
    ess_low: float = 0.3
    gap_kl: float = 0.1  # |k1| and k3, nats/token
    outside_share: float = 0.1  # of tokens outside [0.5, 2]; the level used for masked stale tokens
    gap_jump: float = 10.0  # ours: factor over the recent median of k3 ...
    gap_jump_floor: float = 1e-3  # ... above this many nats/token (rounding alone costs about 2e-4)

    negative_kl: float = -1e-5  # nats/token: what FP32 tiles may leave below zero is 2e-6
    grad_norm_spike: float = 10.0  # ours: factor over the recent median
    deaf_share: float = 1e-4  # ours: of FP4 codes changed per publish (update masking: QuRL, arXiv 2602.13953)

    uniform_share: float = 0.98  # ours: of the largest entropy; weights as they were drawn have 0.99 and more
    own_distance: float = 1e-6  # ours: nats within which a teacher says what the student says, at every token
    own_distance_remote: float = 1e-3  # ours: the same of log-probabilities that came from another machine
    teacher_kl: float = 10.0  # ours: nats/token; a teacher of another vocabulary is as far, one of another domain not
    teacher_certain: float = 1e-4  # ours: nats/token; below it a teacher's distribution is one token
    repeat_error: float = 0.02  # ours: share of the largest number, or nats; BF16 in another order differs by less

    recovery_collapsed: float = 0.2  # (student - base) / (teacher - base) of one domain
    recovery_good: float = 0.8  # ours: at least this counts as recovered
    recovery_spread: float = 0.3  # best minus worst domain
    teacher_margin: float = 0.05  # teacher - base below this leaves recovery undefined
    off_domain_delta: float = 0.01  # student below base by one point and more than the noise of the evaluation


@dataclass(slots=True)
class _Series:
    """What is kept of one metric: its first values, and the latest 64 with their steps."""

    first: list[float] = field(default_factory=list)
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=64))

    def last(self, count: int) -> list[float]:
        return [value for _, value in self.recent][-count:]


History = dict[str, _Series]


class Health:
    """The streaming rules over one stage. Make a new one for each stage; it starts empty when a run is resumed."""

    def __init__(self, levels: Levels | None = None) -> None:
        self.levels = levels or Levels()
        self._history: History = {}
        self._told: dict[tuple[str, str], int] = {}  # (rule, subject) -> step

    def check(self, step: int, values: Mapping[str, float]) -> list[Finding]:
        """What is wrong as of this step. `values` has the names of `opd.metrics.CATALOGUE`; missing ones switch their
        rules off. The same finding comes again after `levels.repeat_steps` at the earliest; those of severity "info"
        come once."""
        findings = _not_finite(values) + _skipped_steps(values, self._history)
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for key, value in finite.items():
            series = self._history.setdefault(key, _Series())
            if len(series.first) < self.levels.baseline:
                series.first.append(value)
            series.recent.append((step, value))
        for rule in (
            _distant_teacher,
            _nothing_to_teach,
            _mismatch_stall,
            _length_inflation,
            _truncated_dominate,
            _teacher_hacking,
            _entropy_collapse,
            _sampler_gap,
            _negative_kl,
            _grad_norm_spike,
            _verifier_errors,
            _deaf_policy,
            _teacher_alarms,
        ):
            findings += rule(finite, self._history, self.levels)
        fresh: list[Finding] = []
        for finding in findings:
            told = self._told.get((finding.rule, finding.subject))
            if told is None or (finding.severity != "info" and step - told >= self.levels.repeat_steps):
                self._told[finding.rule, finding.subject] = step
                fresh.append(finding)
        return fresh


def _by_name(values: Mapping[str, float], group: str) -> Iterator[tuple[str, float]]:
    """(domain, value) of each key "<group>/<domain>"."""
    prefix = group + "/"
    return ((key[len(prefix) :], value) for key, value in values.items() if key.startswith(prefix))


def _change(series: _Series | None, window: int) -> tuple[float, float] | None:
    """Means of the older and the newer half of the last `window` values, or None while there are fewer."""
    if series is None or len(series.recent) < window:
        return None
    values = series.last(window)
    return fmean(values[: window // 2]), fmean(values[window // 2 :])


def _not_finite(values: Mapping[str, float]) -> list[Finding]:
    bad = [f"{key}={value}" for key, value in values.items() if not math.isfinite(value)]
    if not bad:
        return []
    message = (
        f"{', '.join(bad)} not finite. The update of this step can not be trusted: go back to the last checkpoint, "
        "lower the stage's learning_rate or lengthen warmup_steps; if it comes back at the same step, look at its data"
    )
    return [Finding(rule="not_finite", severity="error", message=message)]


def _skipped_steps(values: Mapping[str, float], history: History) -> list[Finding]:
    skipped = values.get("train/skipped_steps", 0.0)
    series = history.get("train/skipped_steps")
    before = series.recent[-1][1] if series else 0.0
    if not skipped > before:
        return []
    message = (
        f"{skipped:.0f} optimizer steps skipped so far, {skipped - before:.0f} of them just now, because a gradient "
        "was not finite; none should be. Lower learning_rate or grad_clip, and look for an overflow in the loss"
    )
    return [Finding(rule="skipped_steps", severity="error", message=message)]


def _distant_teacher(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    return [
        Finding(
            rule="distant_teacher",
            severity="info",
            subject=domain,
            message=f"domain {domain}: distillation starts at a reverse KL of {kl:.3f} nats/token, above "
            f"{levels.distant_kl} (teachers of the same origin start near 0.04). It should fall within tens of steps; "
            "if it does not, begin with SFT on the teacher's answers, or lower stages.distill.learning_rate",
        )
        for domain, kl in _by_name(values, "distill/reverse_kl")
        if len(history[f"distill/reverse_kl/{domain}"].recent) == 1 and kl > levels.distant_kl
    ]


def _nothing_to_teach(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    findings: list[Finding] = []
    for domain, _ in _by_name(values, "distill/reverse_kl"):
        kls = history[f"distill/reverse_kl/{domain}"]
        agreements = history.get(f"distill/top1_agreement/{domain}")
        if agreements is None or min(len(kls.recent), len(agreements.recent)) < levels.window:
            continue
        kl, agreement = fmean(kls.last(levels.window)), fmean(agreements.last(levels.window))
        if kl >= levels.taught_kl or agreement <= levels.taught_agreement:
            continue
        accuracies = history.get(f"eval/pass_at_1/{domain}")
        if accuracies is not None:
            newest = accuracies.recent[-1][0]
            within = [value for step, value in accuracies.recent if step >= newest - levels.window]
            if within[-1] - within[0] > levels.recovery_flat:
                continue  # still gaining
        seen = (
            f"domain {domain}: over {levels.window} steps the reverse KL was {kl:.4f} nats/token (below "
            f"{levels.taught_kl}) and student and teacher agreed on {agreement:.1%} of tokens (above "
            f"{levels.taught_agreement:.0%})"
        )
        initial = fmean(kls.first)
        if initial < levels.taught_kl:
            advice = f"{seen}, from the start ({initial:.4f}). The teacher has nothing to teach here: change the "
            advice += f"teacher or the prompts of {domain}, or stop"
            findings.append(Finding(rule="nothing_to_teach", severity="warning", subject=domain, message=advice))
        else:
            advice = (
                f"{seen}, after {initial:.3f} at the start. The student has caught up with its teacher: more steps "
            )
            advice += "on these prompts add little"
            findings.append(Finding(rule="caught_up", severity="info", subject=domain, message=advice))
    return findings


def _mismatch_stall(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    norms = history.get("train/grad_norm")
    if norms is None or len(norms.recent) < levels.window:
        return []
    norm = fmean(norms.last(levels.window))
    findings: list[Finding] = []
    for domain, _ in _by_name(values, "distill/reverse_kl"):
        kl = _change(history[f"distill/reverse_kl/{domain}"], levels.window)
        agreement = _change(history.get(f"distill/top1_agreement/{domain}"), levels.window)
        student = _change(history.get(f"distill/student_entropy/{domain}"), levels.window)
        teacher = _change(history.get(f"distill/teacher_entropy/{domain}"), levels.window)
        if kl is None or agreement is None or student is None or teacher is None:
            continue
        initial = fmean(history[f"distill/reverse_kl/{domain}"].first)
        gap_before, gap_now = student[0] - teacher[0], student[1] - teacher[1]
        if (
            norm < levels.stall_grad_norm
            and kl[1] > max(levels.taught_kl, levels.stall_share * initial)
            and agreement[1] < levels.taught_agreement
            and kl[1] > kl[0] * (1 - levels.stall_kl)
            and abs(agreement[1] - agreement[0]) < levels.stall_agreement
            and abs(gap_now - gap_before) < levels.stall_entropy
        ):
            message = (
                f"domain {domain}: no progress in {levels.window} steps: reverse KL {kl[0]:.4f} to {kl[1]:.4f} "
                f"nats/token after {initial:.4f} at first, arg-max agreement {agreement[0]:.1%} to "
                f"{agreement[1]:.1%} (flat: less than {levels.stall_agreement:.1%}), entropy gap {gap_before:+.3f} to "
                f"{gap_now:+.3f} (flat: less than {levels.stall_entropy}), gradient norm {norm:.3f} (low: below "
                f"{levels.stall_grad_norm}). Student and teacher may think in different patterns: check that both see "
                "the same chat template and prompt format, begin with SFT on the teacher's answers, or raise "
                "stages.distill.learning_rate"
            )
            findings.append(Finding(rule="mismatch_stall", severity="warning", subject=domain, message=message))
    return findings


def _truncated(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """(subject, key) of the truncation shares in `values`: per domain if there are any, else the overall one."""
    overall = "rollout/truncated_share"
    domains = [(domain, f"{overall}/{domain}") for domain, _ in _by_name(values, overall)]
    return domains or ([("", overall)] if overall in values else [])


def _length_inflation(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    findings: list[Finding] = []
    for subject, key in _truncated(values):
        shares = history[key].last(levels.truncation_rise_steps + levels.smoothing)
        if len(shares) < levels.truncation_rise_steps + levels.smoothing:
            continue
        before, now = fmean(shares[: levels.smoothing]), fmean(shares[-levels.smoothing :])
        if now - before >= levels.truncation_rise:
            message = (
                f"{f'domain {subject}: ' if subject else ''}truncated completions rose from {before:.1%} to {now:.1%} "
                f"in {levels.truncation_rise_steps} steps (alarm: +{levels.truncation_rise:.0%}). This is how a length "
                "collapse begins: stop, go back to a checkpoint from before the rise, lower the learning rate, mix in "
                "demonstrations, and read some completions for repetition"
            )
            findings.append(Finding(rule="length_inflation", severity="error", subject=subject, message=message))
    return findings


def _truncated_dominate(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    findings: list[Finding] = []
    for subject, key in _truncated(values):
        shares = history[key].last(levels.smoothing)
        share = fmean(shares)
        if len(shares) == levels.smoothing and share > levels.truncation_high:
            message = (
                f"{f'domain {subject}: ' if subject else ''}{share:.1%} of completions were cut at the length limit "
                f"over {levels.smoothing} steps (alarm: {levels.truncation_high:.0%}), so the end of an answer "
                "is seldom trained. Raise rollout.sampling.max_new_tokens (and model.max_tokens), or train the base "
                "longer on demonstrations that stop"
            )
            findings.append(Finding(rule="truncated_dominate", severity="warning", subject=subject, message=message))
    return findings


def _teacher_hacking(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    findings: list[Finding] = []
    for domain, _ in _by_name(values, "eval/pass_at_1"):
        kls = history.get(f"distill/reverse_kl/{domain}")
        if kls is None or len(kls.recent) <= levels.baseline:
            continue
        # Evaluations inside a run are of few prompts: one of them says little, the best of many is flattered by chance.
        accuracies = [accuracy for _, accuracy in history[f"eval/pass_at_1/{domain}"].recent]
        runs = [fmean(run) for run in zip(*(accuracies[start:] for start in range(levels.baseline)), strict=False)]
        if not runs:
            continue
        best, accuracy = max(runs), runs[-1]
        initial, now = fmean(kls.first), fmean(kls.last(levels.baseline))
        if best - accuracy >= levels.hacking_accuracy_fall and now < initial * (1 - levels.hacking_kl_fall):
            message = (
                f"domain {domain}: reverse KL fell from {initial:.4f} to {now:.4f} nats/token (alarm: by "
                f"{levels.hacking_kl_fall:.0%}) while accuracy fell from {best:.3f} to {accuracy:.3f} (alarm: by "
                f"{levels.hacking_accuracy_fall}, {levels.baseline} evaluations together). The student may please "
                "the teacher on prefixes it can not judge: "
                "read its completions, shorten max_new_tokens, go back to the checkpoint with the best accuracy"
            )
            findings.append(Finding(rule="teacher_hacking", severity="error", subject=domain, message=message))
    return findings


def _entropy_collapse(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    findings: list[Finding] = []
    policies = [("distill/student_entropy", domain) for domain, _ in _by_name(values, "distill/student_entropy")]
    policies += [("grpo/entropy", domain) for domain, _ in _by_name(values, "grpo/entropy")]
    for group, domain in policies:
        series = history[f"{group}/{domain}"]
        if len(series.recent) < levels.baseline + levels.smoothing:
            continue
        initial, now = fmean(series.first), fmean(series.last(levels.smoothing))
        teachers = history.get(f"distill/teacher_entropy/{domain}")
        teacher = fmean(teachers.last(levels.smoothing)) if teachers is not None else math.inf
        # A specialist is sharper than the base, and following it down is the aim; falling below it is not.
        if now >= levels.entropy_share * initial or now >= levels.entropy_share_of_teacher * teacher:
            continue
        greedy, sampled = history.get(f"eval/pass_at_1/{domain}"), history.get(f"eval/pass_at_k/{domain}")
        spread = ""
        if greedy is not None and sampled is not None and min(len(greedy.recent), len(sampled.recent)) > 1:
            gap_before = sampled.recent[0][1] - greedy.recent[0][1]
            gap_now = sampled.recent[-1][1] - greedy.recent[-1][1]
            if gap_now >= gap_before:
                continue
            spread = f", and pass@k - pass@1 shrank from {gap_before:.3f} to {gap_now:.3f}"
        elif group == "grpo/entropy":
            continue  # reward alone sharpens a policy; only lost variety in its answers makes it a trouble
        of_teacher = f" and {levels.entropy_share_of_teacher:.0%} of its teacher ({teacher:.4f})"
        of_teacher = of_teacher if teacher < math.inf else ""
        message = (
            f"domain {domain}: the policy's entropy fell from {initial:.4f} to {now:.4f} nats/token, below "
            f"{levels.entropy_share:.0%} of its start"
            f"{of_teacher}{spread}. The policy loses its variety: stop earlier, or lower the stage's learning_rate"
        )
        findings.append(Finding(rule="entropy_collapse", severity="warning", subject=domain, message=message))
    return findings


def _sampler_gap(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    kl = f"alarm: above {levels.gap_kl} nats/token"
    outside = f"alarm: outside [{levels.ratio_low}, {levels.ratio_high}]"
    k3 = values.get("gap/k3")
    earlier = history["gap/k3"].last(levels.window + 1)[:-1] if k3 is not None else []
    usual = median(earlier) if len(earlier) >= levels.smoothing else math.inf
    jump = f"{levels.gap_jump:g} times its recent median of {usual:.2g}, at policy version"
    jump += f" {values.get('policy/version', math.nan):.0f}: suspect the last publish"
    alarms: tuple[tuple[str, bool, str], ...] = (
        ("gap/mean_ratio", not levels.ratio_low <= values.get("gap/mean_ratio", 1.0) <= levels.ratio_high, outside),
        ("gap/ess", values.get("gap/ess", 1.0) < levels.ess_low, f"alarm: below {levels.ess_low}"),
        ("gap/k1", abs(values.get("gap/k1", 0.0)) > levels.gap_kl, kl),
        ("gap/k3", k3 is not None and k3 > levels.gap_kl, kl),
        (
            "gap/outside_share",
            values.get("gap/outside_share", 0.0) > levels.outside_share,
            f"alarm: above {levels.outside_share:.0%}",
        ),
        ("gap/k3 jump", k3 is not None and k3 > max(levels.gap_jump * usual, levels.gap_jump_floor), jump),
    )
    return [
        Finding(
            rule="sampler_gap",
            severity="warning",
            subject=subject,
            message=f"sampler and learner disagree: {(key := subject.split()[0])} is {values[key]:.4g} ({alarm}). "
            "Check that the samplers hold the version just published, that learner and sampler quantise alike "
            "(model.fp4), and that rollouts are not stale",
        )
        for subject, raised, alarm in alarms
        if raised
    ]


def _negative_kl(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    keys = (key for key in values if key.startswith(("distill/reverse_kl", "teacher/")) and "reverse_kl" in key)
    return [
        Finding(
            rule="negative_kl",
            severity="error",
            subject=key,
            message=f"{key} is {values[key]:.3g} nats/token; a KL is never negative, and rounding explains no more "
            f"than {levels.negative_kl:g}. Logits or log-sum-exps lose precision: keep heads and logits in FP32, and "
            "compare the losses' fast path with the plain one",
        )
        for key in keys
        if values[key] < levels.negative_kl
    ]


def _grad_norm_spike(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    norm = values.get("train/grad_norm")
    earlier = history["train/grad_norm"].last(levels.window + 1)[:-1] if norm is not None else []
    if norm is None or len(earlier) < levels.window // 2:
        return []
    usual = median(earlier)
    if usual <= 0 or norm <= levels.grad_norm_spike * usual:
        return []
    message = (
        f"gradient norm {norm:.3g} is {norm / usual:.0f} times the median {usual:.3g} of the last {len(earlier)} "
        f"steps (alarm: {levels.grad_norm_spike:g} times). One spike is held by grad_clip; if they repeat, lower "
        "learning_rate and look at the step's longest completions"
    )
    return [Finding(rule="grad_norm_spike", severity="warning", message=message)]


def _verifier_errors(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    errors = values.get("reward/verifier_errors", 0.0)
    if errors <= 0:
        return []
    message = (
        f"the verifier itself failed on {errors:g} answers of this step (alarm: above 0); they count as wrong, so "
        "rewards are too low. Look at the verifier and the reference answers of the domains whose reward fell"
    )
    return [Finding(rule="verifier_errors", severity="warning", message=message)]


def _deaf_policy(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    if "fp4/changed_code_share" not in values or values.get("train/lr", 1.0) <= 0:
        return []
    shares = history["fp4/changed_code_share"].last(levels.window)
    share = fmean(shares)
    if len(shares) < levels.window or share >= levels.deaf_share:
        return []
    message = (
        f"only {share:.2g} of the FP4 codes changed per publish over {levels.window} steps (alarm: below "
        f"{levels.deaf_share:g}): the learner's updates are smaller than the grid, so the sampled policy stands still. "
        "Raise learning_rate, or publish in higher precision (model.fp4=none)"
    )
    return [Finding(rule="deaf_policy", severity="warning", message=message)]


def _teacher_alarms(values: Mapping[str, float], history: History, levels: Levels) -> list[Finding]:
    """What `check_teacher` looks at before a run, in it: from what hosts and learner measured of each teacher."""
    numbers: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        if key.startswith("teacher/"):
            teacher, _, name = key[len("teacher/") :].rpartition("/")
            numbers.setdefault(teacher, {})[name] = value
    findings: list[Finding] = []
    for teacher, measured in numbers.items():
        known = {name: measured[name] for name in ("entropy_share", "repeat_error") if name in measured}
        if "reverse_kl" in measured:
            known["kl"] = measured["reverse_kl"]
            if len(history[f"teacher/{teacher}/reverse_kl"].recent) == 1:  # later it may well be what the student says
                known["distance"] = abs(measured["reverse_kl"])
        findings += check_teacher(teacher, known, levels)
    return findings


def check_teacher(teacher: str, numbers: Mapping[str, float], levels: Levels | None = None) -> list[Finding]:
    """Judges one teacher by what is known of its scores; numbers that are missing switch their rules off.

    `numbers`: finite (1 or 0), repeat_error, entropy_share (of the uniform distribution's), entropy, kl (mean
    KL(student || teacher)), distance (the largest of one token), as `TeacherHost.examine` gives them; with a distance
    but no kl, the teacher is remote and the distance one of log-probabilities. Severity "error": its scores cannot be
    right, or cannot teach.
    """
    levels = levels or Levels()
    own = levels.own_distance if "kl" in numbers else levels.own_distance_remote
    # (rule, whether it fires, what was seen and what to do)
    rules = (
        (
            "teacher_not_finite",
            not numbers.get("finite", 1.0),
            "its hidden states are not finite. Its checkpoint is damaged, or was trained until it broke",
        ),
        (
            "teacher_not_repeatable",
            numbers.get("repeat_error", 0.0) > levels.repeat_error,
            f"asked the same twice it differs by {numbers.get('repeat_error', 0.0):.3g} (alarm: above "
            f"{levels.repeat_error}). Something in it is drawn at random, or its server serves two models",
        ),
        (
            "teacher_uniform",
            numbers.get("entropy_share", 0.0) > levels.uniform_share,
            f"its entropy is {numbers.get('entropy_share', 0.0):.1%} of the uniform distribution's (alarm: above "
            f"{levels.uniform_share:.0%}): it knows nothing. Its weights were never trained, or not loaded",
        ),
        (
            "teacher_certain",
            numbers.get("entropy", 1.0) < levels.teacher_certain,
            f"its entropy is {numbers.get('entropy', 1.0):.2g} nats/token (alarm: below {levels.teacher_certain:g}): "
            "it gives all mass to one token everywhere. Its logits are scaled wrongly, or it has collapsed",
        ),
        (
            "teacher_is_student",
            numbers.get("distance", 1.0) <= own,
            f"it says what the student says, to {numbers.get('distance', 1.0):.2g} nats at every token (alarm: up to "
            f"{own:g}). It is the student itself and teaches nothing: check its path",
        ),
        (
            "teacher_out_of_range",
            numbers.get("kl", 0.0) > levels.teacher_kl,
            f"KL(student || teacher) is {numbers.get('kl', 0.0):.1f} nats/token (alarm: above {levels.teacher_kl:g}). "
            "It speaks of other tokens: check its vocabulary, its chat template and its domains",
        ),
    )
    return [
        Finding(rule=rule, severity="error", subject=teacher, message=f"teacher {teacher}: {seen}")
        for rule, fires, seen in rules
        if fires
    ]


def check_recovery(summary: Mapping[str, Any], levels: Levels | None = None) -> list[Finding]:
    """Judges the final evaluation.

    `summary` has, per domain, `teacher_name`, the accuracies `base`, `teacher` and `student` under "pass@1" (`teacher`
    only where it can sample), and `recovery` = (student - base) / (teacher - base), or None where the teacher is less
    than `teacher_margin` better than the base; `eval.prompts_per_domain` sets the noise that a loss against the base
    must exceed.
    """
    levels = levels or Levels()
    num_prompts = max(int(summary.get("eval", {}).get("prompts_per_domain") or 1), 1)
    findings: list[Finding] = []
    recoveries: dict[str, float] = {}
    for domain, row in summary["domains"].items():
        base, student = (float(row[model]["pass@1"]) for model in ("base", "student"))
        teacher = float(row["teacher"]["pass@1"]) if "teacher" in row else None
        name, recovery = row["teacher_name"], row["recovery"]
        known = "" if teacher is None else f" {teacher:.3f}"
        seen = f"domain {domain}: base {base:.3f}, teacher {name}{known}, student {student:.3f}"
        advice = (
            f"Teacher {name} seems to be the wrong teacher for domain {domain}: check teachers.{name}.path and "
            f"teachers.{name}.domains, and evaluate the teacher alone on {domain}"
        )
        # Two standard errors of a difference of two shares.
        noise = 2 * math.sqrt((base * (1 - base) + student * (1 - student)) / num_prompts)
        loss = max(levels.off_domain_delta, noise)
        if recovery is not None:
            recoveries[domain] = recovery
        if recovery is not None and recovery < levels.recovery_collapsed:
            message = (
                f"{seen}: recovery collapsed to {recovery:.2f} (alarm: below {levels.recovery_collapsed}). {advice}"
            )
            findings.append(Finding(rule="recovery_collapsed", severity="error", subject=domain, message=message))
        elif base - student > loss:
            message = (
                f"{seen}: recovery collapsed, the student lost {base - student:.3f} against the base (alarm: more "
            )
            message += f"than {loss:.3f}). {advice}"
            findings.append(Finding(rule="recovery_collapsed", severity="error", subject=domain, message=message))
        elif recovery is None and teacher is not None:
            message = (
                f"{seen}: the teacher is {teacher - base:+.3f} against the base, less than {levels.teacher_margin}, so "
                f"there is nothing to recover. Train {name} longer, or check that it is the teacher meant for {domain}"
            )
            findings.append(Finding(rule="weak_teacher", severity="warning", subject=domain, message=message))
    if len(recoveries) > 1:
        best, worst = max(recoveries, key=recoveries.__getitem__), min(recoveries, key=recoveries.__getitem__)
        spread = recoveries[best] - recoveries[worst]
        if spread > levels.recovery_spread:
            message = (
                f"recovery is uneven: {best} {recoveries[best]:.2f}, {worst} {recoveries[worst]:.2f}, a spread of "
                f"{spread:.2f} (alarm: above {levels.recovery_spread}). Give {worst} more prompts "
                f"(data.domains.{worst}.weight), or raise its teacher's weight for it"
            )
            findings.append(Finding(rule="recovery_spread", severity="warning", message=message))
    return findings
