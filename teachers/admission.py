"""Whether a teacher may teach: it fits the student, its numbers make sense, and it is the one that taught so far.

Three looks, each before a run does anything that cannot be undone. `check_teachers` reads configurations and tokenizers
and loads no weights; `admit` asks the running hosts and refuses, by name, teachers whose scores cannot be right;
`manifest` writes down who teaches, and `compare_manifests` refuses to go on with other weights under an old name.

Left out: the rules on what an examination found, and those that watch a run (`opd.health`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.chat import Chat, tokenizer_difference
from opd.config import ConfigError, PoolConfig, TeacherConfig
from opd.health import check_teacher
from opd.types import Trajectory
from opd.weights import checkpoint_hash, load_model_config, resolve_checkpoint
from teachers.remote import RemoteTeacher, TeacherError

if TYPE_CHECKING:
    from teachers.pool import TeacherPool

log = logging.getLogger(__name__)


# ---- before anything is loaded ---------------------------------------------------------------------------------------


def check_teachers(
    student_chat: Chat, student_vocab_size: int, teachers: Mapping[str, TeacherConfig], max_tokens: int = 0
) -> list[str]:
    """Compares every teacher with the student before anything is loaded; one line of description per teacher.

    Distillation compares two distributions over the same ids, so each teacher must have the student's tokenizer, by
    content, and a row of its output head for each entry of it. Rows beyond those, which pad a vocabulary, are cut on
    both sides. Raises ConfigError naming teachers.<name>.path and the first difference; for a remote teacher also when
    its server does not answer, encodes the same prompt otherwise, or takes no trajectory of `max_tokens`.
    """
    entries = student_chat.vocab_size
    if student_vocab_size < entries:
        raise ConfigError(
            f"the student's output head has {student_vocab_size} rows, its tokenizer {student_chat.name!r} {entries} "
            "entries"
        )
    descriptions: list[str] = []
    for name, teacher in teachers.items():
        key = f"teachers.{name}.path={teacher.path}"
        if teacher.family == "remote":
            assert teacher.tokenizer is not None  # or the configuration was refused
            _check_tokenizer(key, name, teacher, student_chat, teacher.tokenizer)
            descriptions.append(f"{name}: {_greeted(key, name, teacher, student_chat, max_tokens)}")
            continue
        try:
            folder = resolve_checkpoint(teacher.path, teacher.revision)
            config: Any = load_model_config(folder)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        if (teacher.family == "deepseek_v4") != (config.model_type == "deepseek_v4"):
            raise ConfigError(
                f"{key}: holds a model of type {config.model_type!r}, but teachers.{name}.family={teacher.family}; "
                f"set it to {'deepseek_v4' if config.model_type == 'deepseek_v4' else 'hf'}"
            )
        rows = config.get_text_config().vocab_size
        if rows < entries:
            raise ConfigError(f"{key}: its vocabulary has {rows} entries, the student's tokenizer has {entries}")
        _check_tokenizer(key, name, teacher, student_chat, teacher.tokenizer or str(folder))
        width = config.get_text_config().hidden_size
        vocabulary = str(rows) if rows == entries else f"{entries} of {rows} padded"
        held = "" if teacher.precision is None else f" in {teacher.precision}"
        descriptions.append(
            f"{name}: {config.model_type}{held}, hidden size {width}, vocabulary {vocabulary}, {teacher.path}"
        )
    return descriptions


def _check_tokenizer(key: str, name: str, teacher: TeacherConfig, student_chat: Chat, path: str) -> None:
    try:
        chat = Chat.load(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    difference = tokenizer_difference(student_chat, chat)
    if difference is not None:
        raise ConfigError(f"{key}: its tokenizer is not the student's: {difference}")
    if teacher.effort is not None and teacher.effort not in chat.efforts:
        raise ConfigError(
            f"teachers.{name}.effort={teacher.effort} is not known to its chat template; it has: "
            f"{', '.join(chat.efforts)}"
        )


def _greeted(key: str, name: str, teacher: TeacherConfig, student_chat: Chat, max_tokens: int) -> str:
    """Asks the server to encode a prompt and how long one may be, and says what it is."""
    text = student_chat.render([{"role": "user", "content": "What is 1234 + 5?"}], student_chat.efforts[-1])
    remote = RemoteTeacher(name, teacher)
    try:
        ids, room = remote.tokenize(text), remote.max_model_len()
    except TeacherError as error:
        raise ConfigError(f"{key}: {error}") from None
    finally:
        remote.close()
    if room is not None and room <= max_tokens:
        raise ConfigError(
            f"{key}: its server takes {room} tokens, completion included, and asks for one of those; trajectories of "
            f"model.max_tokens={max_tokens} need {max_tokens + 1}: start it with a larger --max-model-len"
        )
    expected = student_chat.encode_text(text)
    if ids is not None and ids != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(map(len, (ids, expected)))
        )
        raise ConfigError(
            f"{key}: its server encodes the same prompt otherwise than the student's tokenizer: from token {at} on "
            f"{ids[at : at + 4]} where {expected[at : at + 4]} is expected; it does not serve the tokenizer that "
            f"teachers.{name}.tokenizer={teacher.tokenizer} names"
        )
    said = "" if ids is not None else ", which does not say how it encodes"
    return f"{teacher.remote.server} at {', '.join((teacher.path, *teacher.remote.replicas))}{said}"


# ---- before the first step -------------------------------------------------------------------------------------------


def admit(
    pool: TeacherPool, config: PoolConfig, trajectories: Sequence[Trajectory], student: TeacherConfig | None = None
) -> list[str]:
    """Examines every teacher on `trajectories` of the domains it serves (demonstrations will do); one line for each.

    `student` is the checkpoint the student starts from, described as a teacher. Raises ConfigError with every finding
    of severity "error", by teacher, if `pool.examine` is refuse; TeacherError for a remote teacher whose replicas
    disagree or do not answer. With `pool.examine` off nothing is asked.
    """
    if config.examine == "off":
        return []
    lines: list[str] = []
    refused: list[str] = []
    for name, numbers in pool.examine(trajectories, student).items():
        lines.append(f"{name}: {_described(numbers)}")
        for finding in check_teacher(name, numbers):
            if finding.severity == "error" and config.examine == "refuse":
                refused.append(f"{finding.rule}: {finding.message}")
            else:
                log.warning("%s: %s", finding.rule, finding.message)
    if refused:
        shown = "\n  ".join(refused)
        raise ConfigError(f"teachers that cannot be right (pool.examine=warn starts anyway):\n  {shown}")
    return lines


def _described(numbers: Mapping[str, float]) -> str:
    parts: list[str] = []
    if "entropy" in numbers:
        parts.append(f"entropy {numbers['entropy']:.3f} nats/token ({numbers['entropy_share']:.0%} of uniform)")
    if "kl" in numbers:
        parts.append(f"KL(student || teacher) {numbers['kl']:.4f} nats/token")
    elif "distance" in numbers:
        parts.append(f"up to {numbers['distance']:.3f} nats from the student's log-probabilities")
    if "precision_kl" in numbers:
        parts.append(f"KL from itself in BF16 {numbers['precision_kl']:.2e} nats/token")
    return ", ".join(parts) or "no score"


# ---- who taught ------------------------------------------------------------------------------------------------------

Manifest = dict[str, dict[str, Any]]


def manifest(teachers: Mapping[str, TeacherConfig]) -> Manifest:
    """Who teaches, fit for JSON: by teacher, where it is from, sha256 of its weights (for a remote teacher none:
    nobody sees them), how they are held, and its weight in each domain. Reads all weights once."""
    return {
        name: {
            "family": teacher.family,
            "source": str(Path(teacher.path).absolute()) if Path(teacher.path).is_dir() else teacher.path,
            "revision": teacher.revision,
            "sha256": None
            if teacher.family == "remote"
            else checkpoint_hash(resolve_checkpoint(teacher.path, teacher.revision)),
            "precision": teacher.precision,
            "model": teacher.remote.model,
            "domains": {domain: float(weight) for domain, weight in (teacher.domains or {name: 1.0}).items()},
        }
        for name, teacher in sorted(teachers.items())
    }


def compare_manifests(old: Manifest, new: Manifest, allow_changed: bool) -> list[str]:
    """What a run that goes on has for teachers where it had others: one line per difference, none if there is none.

    Teachers may come, go and change their weight in a domain. Raises ConfigError for one that has other weights, or
    holds them otherwise, under its old name, unless `allow_changed` (the key pool.allow_changed). A checkpoint that
    only moved is the same one.
    """
    lines = [f"teacher {name} is new" for name in sorted(new.keys() - old.keys())]
    lines += [f"teacher {name} is gone" for name in sorted(old.keys() - new.keys())]
    for name in sorted(old.keys() & new.keys()):
        before, now = old[name], new[name]
        # Where there is no hash, the name of the source is all there is to go by.
        keys = ["family", "precision", *(["sha256"] if before.get("sha256") else ["source", "revision", "model"])]
        changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
        if changed and not allow_changed:
            raise ConfigError(
                f"teachers.{name} is not the teacher that this run began with: {'; '.join(changed)}. Give it a name of "
                "its own, put the old one back, or set pool.allow_changed=true"
            )
        lines += [f"teacher {name} was changed: {what}" for what in changed]
        if before.get("domains") != now.get("domains"):
            lines.append(f"teacher {name} had the weights {before.get('domains')} and has {now.get('domains')}")
    return lines
