r"""How an answer is judged: what of a completion is the answer, and what it is worth.

The one idea: reading the answer (`answer_format`) and judging it (`verifier`) are separate, so every format works with
every verifier, and a demonstration is written by the same file that reads completions. The text given to `verify` is
what follows the reasoning (`Chat.answer_text`). Left out: prompts, and any judge that is a model.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opd.config import DomainConfig
from opd.types import Prompt

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][+-]?\d{1,3})?", re.ASCII)
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|\)[.:]?\s.*|[.:]\s.*)", re.DOTALL)

_INSTRUCTIONS = {
    "plain": None,
    "tags": "Put the final answer between <answer> and </answer>.",
    "boxed": r"Put the final answer in \boxed{}.",
}


@dataclass(slots=True, kw_only=True, frozen=True)
class Verdict:
    """Example: Verdict(reward=0.4, passed=False, error=None)."""

    reward: float  # finite; 1 is right, 0 is wrong or absent, between them partial credit
    passed: bool  # the answer is entirely right
    error: str | None  # type and message of what the verifier raised; the reward is 0 then


def verify(domain: DomainConfig, prompt: Prompt, answer: str | None) -> Verdict:
    """Judges the text of an answer against `prompt.reference`. None, or text without an answer in it, earns 0.

    Never raises: a verifier is other people's code run on whatever a policy wrote, and one bad pair must not end a
    run. What it raised is returned in `error`, for the metrics to count.
    """
    try:
        found = None if answer is None else extract_answer(answer, domain.answer_format)
        reward = 0.0 if found is None else _judge(domain, prompt.reference, found)
        if not math.isfinite(reward):
            raise ValueError(f"the reward is {reward}")
    except Exception as error:
        return Verdict(reward=0.0, passed=False, error=f"{type(error).__name__}: {error}")
    return Verdict(reward=reward, passed=reward >= 1.0, error=None)


def extract_answer(text: str, answer_format: str) -> str | None:
    r"""The answer that `text` states, stripped, or None: all of it (plain), the last <answer> pair (tags) or the last
    \boxed{} with balanced braces (boxed)."""
    match answer_format:
        case "plain":
            found = text
        case "tags":
            found = next(reversed(_TAGS.findall(text)), "")
        case "boxed":
            found = _last_boxed(text)
        case _:
            raise ValueError(f"answer_format={answer_format!r} is not one of plain, tags, boxed")
    return found.strip() or None


def format_answer(answer: str, answer_format: str) -> str:
    """The text that a demonstration of `answer` contains: `extract_answer` reads the stripped answer back from it."""
    match answer_format:
        case "plain":
            return answer
        case "tags":
            return f"<answer>{answer}</answer>"
        case "boxed":
            return rf"\boxed{{{answer}}}"
        case _:
            raise ValueError(f"answer_format={answer_format!r} is not one of plain, tags, boxed")


def format_instruction(domain: DomainConfig) -> str | None:
    """System text that states the answer's format; None for no system text (plain, or an empty instruction)."""
    if domain.instruction is not None:
        return domain.instruction or None
    return _INSTRUCTIONS[domain.answer_format]


def verifier_name(domain: DomainConfig) -> str:
    """The domain's verifier, or the default of its source: task for reasoning_gym, exact for rows."""
    return domain.verifier or ("task" if domain.source == "reasoning_gym" else "exact")


def _judge(domain: DomainConfig, reference: dict[str, Any], answer: str) -> float:
    match verifier_name(domain):
        case "task":
            assert domain.task is not None
            return float(
                _scorer(domain.task, json.dumps(domain.params, sort_keys=True)).score_answer(answer, reference)
            )
        case "exact":
            return float(answer == str(reference["answer"]).strip())
        case "number":
            expected = _number(str(reference["answer"]))
            if expected is None:
                raise ValueError(f"the reference answer {reference['answer']!r} is not a number")
            return float(_number(answer) == expected)
        case "choice":
            expected = _CHOICE.fullmatch(str(reference["answer"]).strip())
            if expected is None:
                raise ValueError(f"the reference answer {reference['answer']!r} is not a letter")
            chosen = _CHOICE.fullmatch(answer)
            return float(chosen is not None and chosen[1].upper() == expected[1].upper())
        case name:
            raise ValueError(f"verifier={name!r} is not one of task, exact, number, choice")


@functools.lru_cache(maxsize=64)
def _scorer(task: str, params: str) -> Any:
    """A reasoning-gym dataset whose `score_answer` is wanted; some read word lists when they are built."""
    import reasoning_gym  # takes a second to import, which runs on rows need not pay

    return reasoning_gym.create_dataset(task, seed=0, **json.loads(params))


def _number(text: str) -> Decimal | None:
    """The value of a plain decimal number; commas may group thousands. Units, words and fractions give None."""
    text = text.strip().replace("\u2212", "-")
    match = _NUMBER.fullmatch(text)
    if match is None or not re.search(r"\d", text.partition("e")[0].partition("E")[0]):
        return None
    return Decimal(text.replace(",", ""))


def _last_boxed(text: str) -> str:
    start = len(text)
    while (start := text.rfind(r"\boxed{", 0, start)) >= 0:
        depth, at = 1, start + len(r"\boxed{")
        first = at
        while at < len(text):
            if text[at] == "\\":  # \{ and \} are characters, not groups
                at += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[first:at]
            at += 1
    return ""
