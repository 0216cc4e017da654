"""Reading and judging answers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from opd.config import DomainConfig
from opd.types import Prompt
from opd.verifiers import Verdict, extract_answer, format_answer, format_instruction, verify

RIGHT = Verdict(reward=1.0, passed=True, error=None)
WRONG = Verdict(reward=0.0, passed=False, error=None)


def prompt(**reference: Any) -> Prompt:
    return Prompt(id="d/eval/0", domain="d", effort="none", token_ids=(0,), reference=reference)


def rows(verifier: str | None, answer_format: str = "plain") -> DomainConfig:
    return DomainConfig(source="rows", path="x.jsonl", verifier=verifier, answer_format=answer_format)


def test_what_is_formatted_is_read_back_from_any_surroundings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        answer = "".join(rng.choice("ab1 \n{}<>.,-") for _ in range(12)).strip()
        balanced = rf"\frac{{{rng.randrange(9)}}}{{\sqrt{{{rng.randrange(9)}}}}} \}}"
        assert extract_answer(format_answer(answer, "plain"), "plain") == (answer or None)
        assert extract_answer(f"so {format_answer(answer, 'tags')} .", "tags") == (answer or None)
        assert extract_answer(rf"first \boxed{{0}}, then {format_answer(balanced, 'boxed')} }}", "boxed") == balanced


@pytest.mark.parametrize(
    ("text", "answer_format", "answer"),
    [
        (" 7\n", "plain", "7"),
        ("  ", "plain", None),
        ("<answer>1</answer> no, <answer> 2\n</answer>", "tags", "2"),
        ("<answer>1", "tags", None),
        ("7", "tags", None),
        (r"\boxed{1} and \boxed{x{2}}", "boxed", "x{2}"),
        (r"\boxed{1} and \boxed{2", "boxed", "1"),
        (r"\boxed{}", "boxed", None),
        (r"\boxed 7", "boxed", None),
        ("\\boxed{a\\", "boxed", None),
    ],
)
def test_extract(text: str, answer_format: str, answer: str | None) -> None:
    assert extract_answer(text, answer_format) == answer


@pytest.mark.parametrize(
    ("verifier", "reference", "right", "wrong"),
    [
        (None, "Paris", ["Paris", " Paris\n"], ["paris", "Paris.", ""]),
        (
            "number",
            "1234",
            ["1234", "1,234", "+1234.0", "1.234e3", " 1234. "],
            ["123", "1,23,4", "1234 km", "e", ".", "-1234"],
        ),
        ("number", "-0.50", ["-.5", "-0.5", "\u22120.5"], ["0.5", "1/2", "1e99999999"]),
        ("choice", "B", ["B", "b", "(B)", "B.", "B) Paris", "(b): it is"], ["A", "But", "A or B", "", "BB"]),
        ("choice", "(b)", ["B"], ["A"]),
    ],
)
def test_judges(verifier: str | None, reference: str, right: list[str], wrong: list[str]) -> None:
    for answer_format in ("plain", "tags", "boxed"):
        domain = rows(verifier, answer_format)
        for answer in right:
            assert verify(domain, prompt(answer=reference), format_answer(answer, answer_format)) == RIGHT, answer
        for answer in wrong:
            assert verify(domain, prompt(answer=reference), format_answer(answer, answer_format)) == WRONG, answer
        assert verify(domain, prompt(answer=reference), None) == WRONG
    assert verify(rows(verifier, "boxed"), prompt(answer=reference), reference) == WRONG  # right, but not where asked


def test_a_task_judges_by_its_own_score() -> None:
    domain = DomainConfig(task="spell_backward", params={"max_word_len": 5})
    entry = prompt(question="?", answer="nus", metadata={})
    assert verify(domain, entry, "nus") == RIGHT
    partial = verify(domain, entry, "nux")
    assert partial.reward == pytest.approx(2 / 3) and not partial.passed and partial.error is None
    assert verify(domain, entry, "zzz") == WRONG
    assert verify(domain, entry, None) == WRONG
    assert verify(DomainConfig(task="chain_sum"), prompt(answer="1000", metadata={}), "1,000.0") == RIGHT


@pytest.mark.parametrize(
    ("domain", "reference", "error"),
    [
        (DomainConfig(task="spell_backward"), {}, "KeyError: 'answer'"),
        (DomainConfig(task="no_such_task"), {"answer": "1"}, "ValueError: Dataset 'no_such_task' not registered"),
        (rows("number"), {"answer": "twelve"}, "ValueError: the reference answer 'twelve' is not a number"),
        (rows("choice"), {"answer": "both"}, "ValueError: the reference answer 'both' is not a letter"),
        (rows("exact"), {}, "KeyError: 'answer'"),
    ],
)
def test_a_verifier_that_raises_earns_nothing_and_says_why(
    domain: DomainConfig, reference: dict[str, str], error: str
) -> None:
    assert verify(domain, prompt(**reference), "12") == Verdict(reward=0.0, passed=False, error=error)


def test_a_reward_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Task:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            return float("nan")

    monkeypatch.setattr("reasoning_gym.create_dataset", lambda task, **settings: Task())
    verdict = verify(DomainConfig(task="nan_task"), prompt(answer="1"), "1")
    assert verdict == Verdict(reward=0.0, passed=False, error="ValueError: the reward is nan")


def test_instructions() -> None:
    assert format_instruction(rows(None)) is None
    assert "<answer>" in (format_instruction(rows(None, "tags")) or "")
    assert r"\boxed{}" in (format_instruction(rows(None, "boxed")) or "")
    assert format_instruction(DomainConfig(instruction="Say it.", answer_format="boxed")) == "Say it."
    assert format_instruction(DomainConfig(instruction="", answer_format="boxed")) is None
