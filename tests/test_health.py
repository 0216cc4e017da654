from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from opd.health import Finding, Health, Levels, check_recovery
from opd.metrics import describe


def healthy(step: int, noise: random.Random) -> dict[str, float]:
    """A distillation that goes well: a distribution that narrows onto its teacher, with the noise of small batches."""
    decay = math.exp(-step / 30)
    values: dict[str, float] = {
        "train/loss": 0.08 * decay + 0.004,
        "train/grad_norm": (2.0 * decay + 0.4) * math.exp(noise.gauss(0, 0.3)),
        "train/lr": 1e-3,
        "train/skipped_steps": 0,
        "distill/reverse_kl": 0.08 * decay + 0.02,
        "gap/k1": noise.gauss(0, 1e-6),
        "gap/k3": 1e-6 * math.exp(noise.gauss(0, 0.8)),
        "gap/ess": 0.999,
        "gap/mean_ratio": 1.0,
        "gap/outside_share": 0.0,
        "rollout/truncated_share": 0.1,
        "reward/verifier_errors": 0,
        "policy/version": step,
        "fp4/changed_code_share": 0.01,
    }
    for domain in ("add", "sort"):
        values[f"distill/reverse_kl/{domain}"] = (0.05 * decay + 0.012) * math.exp(noise.gauss(0, 0.1))
        values[f"distill/top1_agreement/{domain}"] = 0.95 - 0.2 * decay + noise.gauss(0, 0.005)
        values[f"distill/student_entropy/{domain}"] = 0.2 + 0.6 * decay + noise.gauss(0, 0.01)
        values[f"distill/teacher_entropy/{domain}"] = 0.2 + 0.1 * decay + noise.gauss(0, 0.01)
        values[f"rollout/truncated_share/{domain}"] = sum(noise.random() < 0.08 for _ in range(32)) / 32
        if step % 25 == 0:
            values[f"eval/pass_at_1/{domain}"] = 0.9 - 0.7 * decay + noise.gauss(0, 0.02)
            values[f"eval/pass_at_k/{domain}"] = 0.95 - 0.3 * decay + noise.gauss(0, 0.02)
    return values


def run(change: Callable[[int, dict[str, float]], None], steps: int = 80, seed: int = 0) -> dict[int, list[Finding]]:
    """Findings by step of a healthy run in which `change` has spoilt something."""
    noise, health = random.Random(seed), Health()
    found: dict[int, list[Finding]] = {}
    for step in range(1, steps + 1):
        values = healthy(step, noise)
        change(step, values)
        if findings := health.check(step, values):
            found[step] = findings
    return found


def rules(found: dict[int, list[Finding]]) -> set[tuple[str, str]]:
    return {(finding.rule, finding.subject) for findings in found.values() for finding in findings}


def first(found: dict[int, list[Finding]], rule: str) -> tuple[int, Finding]:
    return next((step, finding) for step, findings in found.items() for finding in findings if finding.rule == rule)


def nothing(step: int, values: dict[str, float]) -> None:
    pass


@pytest.mark.parametrize("seed", range(20))
def test_healthy_run_is_left_in_peace(seed: int) -> None:
    assert rules(run(nothing, steps=200, seed=seed)) == set()


def test_rules_read_names_that_exist() -> None:
    assert all(describe(key) for key in healthy(25, random.Random(0)))


def test_empty_and_unknown_values_are_no_trouble() -> None:
    health = Health()
    for step in range(100):
        assert health.check(step, {}) == []
        assert health.check(step, {"something/else": 1.0}) == []


def put(**changes: Callable[[int], float]) -> Callable[[int, dict[str, float]], None]:
    """Sets keys, written with __ for /, to functions of the step."""

    def change(step: int, values: dict[str, float]) -> None:
        values.update({name.replace("__", "/"): of(step) for name, of in changes.items()})

    return change


def mismatch(step: int, values: dict[str, float]) -> None:
    values["train/grad_norm"] = 0.2
    values["distill/reverse_kl/sort"] = 0.09
    values["distill/top1_agreement/sort"] = 0.7
    values["distill/student_entropy/sort"] = 0.5
    values["distill/teacher_entropy/sort"] = 0.3


def taught(step: int, values: dict[str, float]) -> None:
    values["distill/reverse_kl/sort"] = 0.002
    values["distill/top1_agreement/sort"] = 0.97
    if "eval/pass_at_1/sort" in values:
        values["eval/pass_at_1/sort"] = 0.5


def hacked(step: int, values: dict[str, float]) -> None:
    values.pop("eval/pass_at_1/sort", None)
    if step % 10 == 0:
        values["eval/pass_at_1/sort"] = 0.8 if step < 40 else 0.6


def test_one_low_evaluation_is_chance() -> None:
    def unlucky(step: int, values: dict[str, float]) -> None:
        values.pop("eval/pass_at_1/sort", None)
        if step % 10 == 0:
            values["eval/pass_at_1/sort"] = 0.75 if step in (30, 60) else 0.6  # of 64 prompts, at a true 0.65

    assert rules(run(unlucky)) == set()


def sharpened(step: int, values: dict[str, float]) -> None:
    values["distill/student_entropy/sort"] = 0.8 * math.exp(-step / 15)
    values["distill/teacher_entropy/sort"] = 0.3
    values.pop("eval/pass_at_k/sort", None)


AFTER = 40  # from this step on something is wrong

SPOILT: list[tuple[str, str, str, Callable[[int, dict[str, float]], None]]] = [
    ("distant_teacher", "sort", "info", put(distill__reverse_kl__sort=lambda step: 0.3 / step + 0.02)),
    ("nothing_to_teach", "sort", "warning", taught),
    ("mismatch_stall", "sort", "warning", mismatch),
    (
        "length_inflation",
        "sort",
        "error",
        put(rollout__truncated_share__sort=lambda step: 0.05 + 0.02 * min(max(step - AFTER, 0), 11)),
    ),
    ("truncated_dominate", "sort", "warning", put(rollout__truncated_share__sort=lambda step: 0.35)),
    ("teacher_hacking", "sort", "error", hacked),
    ("entropy_collapse", "sort", "warning", sharpened),
    ("sampler_gap", "gap/mean_ratio", "warning", put(gap__mean_ratio=lambda step: 2.5 if step > AFTER else 1.0)),
    ("sampler_gap", "gap/ess", "warning", put(gap__ess=lambda step: 0.2 if step > AFTER else 1.0)),
    ("sampler_gap", "gap/k1", "warning", put(gap__k1=lambda step: -0.2 if step > AFTER else 0.0)),
    ("sampler_gap", "gap/outside_share", "warning", put(gap__outside_share=lambda step: 0.2 * (step > AFTER))),
    ("sampler_gap", "gap/k3 jump", "warning", put(gap__k3=lambda step: 0.02 if step > AFTER else 1e-4)),
    ("negative_kl", "distill/reverse_kl", "error", put(distill__reverse_kl=lambda step: -2e-5)),
    ("negative_kl", "teacher/x/reverse_kl", "error", put(teacher__x__reverse_kl=lambda step: -2e-5)),
    ("not_finite", "", "error", put(train__loss=lambda step: math.nan if step == AFTER else 1.0)),
    ("skipped_steps", "", "error", put(train__skipped_steps=lambda step: 2 * (step >= AFTER))),
    ("grad_norm_spike", "", "warning", put(train__grad_norm=lambda step: 20.0 if step == AFTER else 1.0)),
    ("verifier_errors", "", "warning", put(reward__verifier_errors=lambda step: step % 3)),
    ("deaf_policy", "", "warning", put(fp4__changed_code_share=lambda step: 1e-6)),
]


@pytest.mark.parametrize(
    ("rule", "subject", "severity", "change"), SPOILT, ids=[f"{row[0]}-{row[1]}" for row in SPOILT]
)
def test_each_rule_sees_its_trouble_and_no_other_rule_does(
    rule: str, subject: str, severity: str, change: Callable[[int, dict[str, float]], None]
) -> None:
    found = run(change)
    assert rules(found) == {(rule, subject)}
    _, finding = first(found, rule)
    assert finding.severity == severity
    # Says where, with at least two numbers (what was seen, the threshold), and what to do.
    assert len(re.findall(r"\d+(?:\.\d+)?", finding.message)) >= 2 or rule == "not_finite"
    assert not subject or subject.split()[0] in finding.message
    assert len(finding.message) > 100 and finding.message.isascii()


@pytest.mark.parametrize(
    ("rule", "subject", "severity", "change"), SPOILT, ids=[f"{row[0]}-{row[1]}" for row in SPOILT]
)
def test_a_finding_comes_again_after_twenty_steps_at_the_earliest_and_info_once(
    rule: str, subject: str, severity: str, change: Callable[[int, dict[str, float]], None]
) -> None:
    found = run(change, steps=160)
    steps = [step for step, findings in found.items() for finding in findings if finding.rule == rule]
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(steps))
    if severity == "info":
        assert len(steps) == 1
    elif rule in ("mismatch_stall", "truncated_dominate", "negative_kl", "deaf_policy", "verifier_errors"):
        assert len(steps) >= 6  # the trouble stays, so the finding does


def test_troubles_of_two_domains_are_told_side_by_side() -> None:
    def both(step: int, values: dict[str, float]) -> None:
        values["rollout/truncated_share/add"] = 0.5
        values["rollout/truncated_share/sort"] = 0.5 if step > 10 else 0.0

    found = run(both, steps=16)
    told = [(step, finding.subject) for step, findings in found.items() for finding in findings
            if finding.rule == "truncated_dominate"]  # fmt: skip
    assert told == [(5, "add"), (14, "sort")]


def test_alarm_is_raised_in_time_for_a_length_collapse() -> None:
    collapse = put(
        rollout__truncated_share__add=lambda step: 1 / (1 + math.exp(-(step - 60) / 5)),
        rollout__truncated_share__sort=lambda step: 0.05,
    )
    step, finding = first(run(collapse), "length_inflation")
    assert 1 / (1 + math.exp(-(step - 60) / 5)) < 0.5
    assert "+15%" in finding.message and "add" in finding.message


def test_overall_truncation_counts_where_domains_are_not_logged() -> None:
    health = Health()
    findings = [finding for step in range(20) for finding in health.check(step, {"rollout/truncated_share": 0.4})]
    assert [(finding.rule, finding.subject) for finding in findings] == [("truncated_dominate", "")]


def test_student_that_has_caught_up_is_told_apart_from_a_teacher_with_nothing_to_teach() -> None:
    def learnt(step: int, values: dict[str, float]) -> None:
        values["distill/reverse_kl/sort"] = 0.09 * math.exp(-step / 5) + 0.001
        values["distill/top1_agreement/sort"] = 0.97
        if "eval/pass_at_1/sort" in values:
            values["eval/pass_at_1/sort"] = 0.9

    found = run(learnt, steps=150)
    assert rules(found) == {("caught_up", "sort")}
    assert sum(len(findings) for findings in found.values()) == 1


def test_still_gaining_accuracy_is_not_nothing_to_teach() -> None:
    health = Health()
    for step in range(1, 100):
        values = {"distill/reverse_kl/a": 0.002, "distill/top1_agreement/a": 0.99, "eval/pass_at_1/a": step / 100}
        assert health.check(step, values) == []


def test_entropy_that_follows_a_sharper_teacher_is_no_collapse() -> None:
    health = Health()
    for step in range(100):
        entropy = 0.8 * math.exp(-step / 15) + 0.02
        assert health.check(step, {"distill/student_entropy/a": entropy, "distill/teacher_entropy/a": 0.03}) == []


@pytest.mark.parametrize("gap_at_end", [0.05, 0.4, None])
def test_grpo_may_sharpen_the_policy_until_its_answers_lose_variety(gap_at_end: float | None) -> None:
    health = Health()
    found: list[Finding] = []
    for step in range(60):
        values = {"grpo/entropy/a": 0.8 * math.exp(-step / 15)}
        if gap_at_end is not None and step % 10 == 0:
            values |= {"eval/pass_at_1/a": 0.5, "eval/pass_at_k/a": 0.5 + 0.2 + (gap_at_end - 0.2) * step / 60}
        found += health.check(step, values)
    assert {finding.rule for finding in found} == ({"entropy_collapse"} if gap_at_end == 0.05 else set())


def test_skipped_steps_count_once_each() -> None:
    health = Health()
    counts = [0] * 5 + [1] * 30 + [3] * 30
    told = [step for step, count in enumerate(counts) if health.check(step, {"train/skipped_steps": count})]
    assert told == [5, 35]


def test_levels_can_be_changed_and_are_named_in_messages() -> None:
    health = Health(dataclasses.replace(Levels(), truncation_high=0.77))
    for step in range(10):
        assert health.check(step, {"rollout/truncated_share": 0.6}) == []
    findings = [finding for step in range(10, 40) for finding in health.check(step, {"rollout/truncated_share": 0.9})]
    assert any("77%" in finding.message for finding in findings if finding.rule == "truncated_dominate")


def outcome(**domains: tuple[float, float, float]) -> dict[str, Any]:
    """A summary from (base, teacher, student) per domain."""
    rows = {
        domain: {
            "teacher_name": f"{domain}_expert",
            "base": {"pass@1": base},
            "teacher": {"pass@1": teacher},
            "student": {"pass@1": student},
            "recovery": (student - base) / (teacher - base) if teacher - base >= 0.05 else None,
        }
        for domain, (base, teacher, student) in domains.items()
    }
    return {"domains": rows, "eval": {"prompts_per_domain": 200, "k": 4}}


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ({"add": (0.2, 0.9, 0.85), "sort": (0.1, 0.8, 0.7)}, set()),
        ({"add": (0.2, 0.9, 0.25)}, {("recovery_collapsed", "add")}),
        ({"add": (0.5, 0.2, 0.2)}, {("recovery_collapsed", "add")}),  # a teacher of something else drags it down
        ({"add": (0.5, 0.52, 0.5)}, {("weak_teacher", "add")}),
        ({"add": (0.5, 0.52, 0.45)}, {("weak_teacher", "add")}),  # within the noise of 200 prompts
        ({"add": (0.2, 0.9, 0.88), "sort": (0.1, 0.8, 0.5)}, {("recovery_spread", "")}),
        ({"add": (0.2, 0.9, 0.88), "sort": (0.1, 0.8, 0.1)}, {("recovery_collapsed", "sort"), ("recovery_spread", "")}),
    ],
)
def test_final_evaluation(domains: dict[str, tuple[float, float, float]], expected: set[tuple[str, str]]) -> None:
    findings = check_recovery(outcome(**domains))
    assert {(finding.rule, finding.subject) for finding in findings} == expected


def test_swapped_teachers_are_named() -> None:
    (finding,) = check_recovery(outcome(add=(0.5, 0.2, 0.2)))
    assert "recovery collapsed" in finding.message and finding.severity == "error"
    assert "Teacher add_expert seems to be the wrong teacher for domain add" in finding.message
    assert "teachers.add_expert.path" in finding.message
