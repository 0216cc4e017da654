"""Domains: where questions come from, which are held out, and in which order they are drawn.

The one idea: a question is a function of (domain, split, index). Everything is drawn on demand and by stable hashes, so
start-up is quick, a resumed run sees the prompts of an unbroken one, and which questions are held out depends neither
on the order of drawing nor on the process. Sources are reasoning-gym tasks and rows read through `datasets`. Left out:
how an answer is judged (`opd.verifiers`) and how messages become ids (`opd.chat`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from opd.chat import END_THINK, THINK, Chat
from opd.config import Config, ConfigError, DomainConfig
from opd.types import Prompt, Trajectory, no_routing
from opd.verifiers import extract_answer, format_answer, format_instruction, verifier_name

_log = logging.getLogger(__name__)

# Our names of columns -> where they are looked for; a dot reaches into a nested column. `reward_model.ground_truth`
# and `extra_info` are verl's, `messages` is TRL's.
_COLUMNS = {
    "prompt": ("prompt",),
    "messages": ("messages",),
    "answer": ("answer", "reward_model.ground_truth"),
    "reasoning": ("reasoning",),
    "data_source": ("data_source",),
    "metadata": ("extra_info",),
}
_MAX_REDRAWS = 1000  # training draws in a row that may hit held-out questions
_CACHED_PROMPTS = 4096
# Training questions whose length is looked at before a stage starts: a tenth of a millisecond or three each.
_EXAMINED = {"rows": 20_000, "reasoning_gym": 1000}


class Domain:
    """One domain's questions as encoded prompts.

    `name`, `config`, `train_size` (indices that `train` takes), `eval` (held-out prompts, distinct, config.num_eval of
    them or as many as exist, at least one). No question of `eval` is ever returned by `train`.
    """

    def __init__(self, name: str, config: DomainConfig, chat: Chat, max_tokens: int, max_new_tokens: int) -> None:
        """`max_tokens` is the context, `max_new_tokens` the part kept for the completion. Raises ConfigError for
        whatever the source refuses, an effort the chat template lacks, no questions, or a held-out prompt too long."""
        key = f"data.domains.{name}"
        if config.effort not in chat.efforts:
            raise ConfigError(
                f"{key}.effort={config.effort!r} is not known to the chat template of {chat.name!r}; it has: "
                f"{', '.join(chat.efforts)}"
            )
        self.name = name
        self.config = config
        self._chat = chat
        self._max_tokens = max_tokens
        self._max_new_tokens = max_new_tokens
        self._source = _open_source(name, config)
        self.train_size = self._source.train_size
        self.eval: list[Prompt] = [
            self._encode(f"{name}/eval/{index}", question) for index, question in self._source.held_out
        ]
        self.train = functools.lru_cache(maxsize=_CACHED_PROMPTS)(self._draw)
        self.train(0)  # a domain whose training questions are all held out is refused now, not in step 1

    def _draw(self, index: int) -> Prompt:
        """The training prompt of `index` in [0, train_size). Raises ConfigError when it is too long."""
        if not 0 <= index < self.train_size:
            raise IndexError(f"training index {index} of domain {self.name!r} is not in [0, {self.train_size})")
        return self._encode(f"{self.name}/train/{index}", self._source.train(index))

    def examine(self, *, demonstrated: bool) -> None:
        """Looks for training prompts (and, if `demonstrated`, answers to them) that do not fit into the context: at all
        of them, or at as many, evenly spread, as take a few seconds. Raises ConfigError for the first one found."""
        most = min(_EXAMINED[self.config.source], self.train_size)
        for position in range(most):
            prompt = self._draw(position * self.train_size // most)
            if demonstrated:
                self.demonstration(prompt)

    def demonstration(self, prompt: Prompt) -> Trajectory:
        """The prompt followed by the reference answer in the domain's format and effort; every completion token, the
        stop token included, is a loss token. Raises ConfigError when it exceeds the context or has no reference."""
        completion = prompt.reference.get("completion")
        if completion is None:
            raise ConfigError(f"data.domains.{self.name}: prompt {prompt.id} has no reference answer to demonstrate")
        tail = self._chat.encode_completion(completion, prompt.effort, prompt.reference.get("reasoning", ""))
        token_ids = np.asarray((*prompt.token_ids, *tail), dtype=np.int32)
        if len(token_ids) > self._max_tokens:
            raise ConfigError(
                f"data.domains.{self.name}: the demonstration of prompt {prompt.id} has {len(token_ids)} tokens; "
                f"model.max_tokens={self._max_tokens} is the limit"
            )
        loss_mask = np.zeros(len(token_ids), dtype=bool)
        loss_mask[len(prompt.token_ids) :] = True
        return Trajectory(
            id=f"{prompt.id}#demo",
            prompt_id=prompt.id,
            domain=self.name,
            token_ids=token_ids,
            loss_mask=loss_mask,
            sampler_logprobs=np.zeros(len(token_ids), dtype=np.float32),
            version_spans=(),
            finish_reason="stop",
            routing=no_routing(len(token_ids)),
        )

    def _encode(self, prompt_id: str, question: _Question) -> Prompt:
        try:
            token_ids = self._chat.encode_prompt(question.messages, self.config.effort)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"data.domains.{self.name}: prompt {prompt_id}: {error}") from error
        limit = self._max_tokens - self._max_new_tokens
        if len(token_ids) > limit:
            raise ConfigError(
                f"data.domains.{self.name}: prompt {prompt_id} has {len(token_ids)} tokens; at most {limit} fit "
                f"(model.max_tokens={self._max_tokens} - rollout.sampling.max_new_tokens={self._max_new_tokens})"
            )
        return Prompt(
            id=prompt_id,
            domain=self.name,
            effort=self.config.effort,
            token_ids=token_ids,
            reference=question.reference,
        )


def load_domains(config: Config, chat: Chat, names: list[str] | None = None) -> dict[str, Domain]:
    """The domains of `config` (all, or those named), their held-out prompts encoded. Raises ConfigError."""
    domains = config.data.domains
    for name in names or ():
        if name not in domains:
            raise ConfigError(f"domain {name!r} is unknown; data.domains has: {', '.join(domains) or 'none'}")
    return {
        name: Domain(name, domains[name], chat, config.model.max_tokens, config.rollout.sampling.max_new_tokens)
        for name in (domains if names is None else names)
    }


def domain_texts(config: Config, samples_per_domain: int) -> Iterator[str]:
    """Text a tokenizer should learn from: of up to `samples_per_domain` training questions of each domain every
    message, the reasoning and the completion, each as a text of its own because special tokens part them."""
    for name, domain in config.data.domains.items():
        source = _open_source(name, domain)
        for index in range(min(samples_per_domain, source.train_size)):
            question = source.train(index)
            yield from (message["content"] for message in question.messages)
            if domain.effort != "none" and question.reference.get("reasoning"):
                yield question.reference["reasoning"]
            if question.reference.get("completion"):
                yield question.reference["completion"]


class PromptStream:
    """An endless mix of training prompts, each domain in its share.

    Prompt k comes from the domain that is furthest behind weight * k (ties by a hash of the seed), so no domain is ever
    a whole prompt ahead of its share, and shares are exact whenever they are whole numbers. Each domain walks through
    a new seeded permutation of its indices every epoch. The sequence depends on nothing but the domains and the seed;
    in particular not on how many prompts are asked for at a time.
    """

    def __init__(self, domains: dict[str, Domain], seed: int) -> None:
        """Raises ConfigError when no domain has a weight above 0; such domains are never drawn."""
        weights = {name: Fraction(str(domain.config.weight)) for name, domain in domains.items()}
        total = sum(weights.values())
        if total <= 0:
            raise ConfigError(f"data.domains.*.weight is 0 for every domain of {', '.join(domains) or 'none'}")
        self._domains = {name: domain for name, domain in domains.items() if weights[name] > 0}
        self._shares = {name: weights[name] / total for name in self._domains}
        self._seed = seed
        self._drawn = dict.fromkeys(self._domains, 0)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # domain -> its current epoch and permutation

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. From a domain's second epoch on, ids end in "~<epoch>", so ids stay unique."""
        return [self._next_of(self._furthest_behind()) for _ in range(n)]

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values. Example: {"drawn": {"a": 3, "b": 1}, "mix": {"seed": 0, ...}}."""
        return {"drawn": dict(self._drawn), "mix": self._mix()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues at a position `state()` returned. Raises ConfigError when the mix has changed since, because the
        prompts that follow would not be those of the unbroken run."""
        for key, now in self._mix().items():
            then = state["mix"].get(key)
            if then != now:
                raise ConfigError(f"the data position was saved with {key} {then}, but the run now has {now}")
        self._drawn = {name: int(state["drawn"][name]) for name in self._drawn}

    def _mix(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shares": {name: str(share) for name, share in self._shares.items()},
            "sizes": {name: domain.train_size for name, domain in self._domains.items()},
        }

    def _furthest_behind(self) -> str:
        position = sum(self._drawn.values()) + 1
        behind = {name: share * position - self._drawn[name] for name, share in self._shares.items()}
        furthest = max(behind.values())
        tied = [name for name, lag in behind.items() if lag == furthest]
        return min(tied, key=lambda name: stable_hash(self._seed, position, name)) if len(tied) > 1 else tied[0]

    def _next_of(self, name: str) -> Prompt:
        domain = self._domains[name]
        epoch, offset = divmod(self._drawn[name], domain.train_size)
        if self._orders.get(name, (-1,))[0] != epoch:
            generator = np.random.default_rng(stable_hash(self._seed, name, epoch))
            self._orders[name] = (epoch, generator.permutation(domain.train_size))
        prompt = domain.train(int(self._orders[name][1][offset]))
        self._drawn[name] += 1
        return prompt if epoch == 0 else dataclasses.replace(prompt, id=f"{prompt.id}~{epoch}")


def stable_hash(*parts: object) -> int:
    """64 bits of the parts' text, the same in every process (Python's own hash of a string is not)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(slots=True, kw_only=True, frozen=True)
class _Question:
    """A question before it is encoded. `reference` has "question", "answer", "metadata", and for demonstrations
    "completion" (text of the answer in its format; absent when the source has no answer) and "reasoning"."""

    messages: list[dict[str, str]]
    reference: dict[str, Any]


def _open_source(name: str, config: DomainConfig) -> _GymSource | _RowSource:
    match config.source:
        case "reasoning_gym":
            return _GymSource(name, config)
        case "rows":
            return _RowSource(name, config)
        case source:
            raise ConfigError(f"data.domains.{name}.source={source!r} is not one of reasoning_gym, rows")


class _GymSource:
    """Questions of a reasoning-gym task, generated on demand.

    The task seeds a generator with seed + index, and some tasks need that below 2 ** 32. Training seeds lie in the
    lower half and evaluation seeds in the upper, with room for 2 ** 30 indices, so the two streams never share one.
    They do not depend on the domain's name: two domains of one task and seed hold out the same questions.
    """

    def __init__(self, name: str, config: DomainConfig) -> None:
        self._key = f"data.domains.{name}"
        self._config = config
        self.train_size = config.num_train
        offset = stable_hash(config.seed, config.task) % 2**30
        self._train = self._create(offset, config.num_train)
        num_draws = 1000 + 20 * config.num_eval
        evaluation = self._create(2**31 + offset, num_draws)
        self.held_out: list[tuple[int, _Question]] = []
        self._held_out_texts: set[str] = set()
        for index in range(num_draws):
            if len(self.held_out) == config.num_eval:
                break
            entry = self._entry(evaluation, index)
            text = _normalise(entry["question"])
            if text not in self._held_out_texts:
                self._held_out_texts.add(text)
                self.held_out.append((index, self._question(entry)))
        _warn_num_eval(self._key, config, len(self.held_out), f"distinct questions in {num_draws} draws of the task")

    def train(self, index: int) -> _Question:
        """The question of `index`, or of the next index whose question is not held out."""
        num_tries = min(_MAX_REDRAWS, self.train_size)
        for step in range(num_tries):
            entry = self._entry(self._train, (index + step) % self.train_size)
            if _normalise(entry["question"]) not in self._held_out_texts:
                return self._question(entry)
        raise ConfigError(
            f"{self._key}.num_eval={self._config.num_eval} leaves nothing to train on: {num_tries} questions of task "
            f"{self._config.task!r} drawn in a row are all held out; lower num_eval, raise num_train or widen params"
        )

    def _create(self, seed: int, size: int) -> Any:
        from reasoning_gym.factory import DATASETS, create_dataset  # a second to import; runs on rows need not pay

        task, params = self._config.task, dict(self._config.params)
        if task not in DATASETS:
            close = difflib.get_close_matches(str(task), DATASETS, n=5, cutoff=0.5)
            hint = f"close: {', '.join(close)}" if close else f"it has {', '.join(sorted(DATASETS))}"
            raise ConfigError(f"{self._key}.task={task!r} is not a reasoning-gym task; {hint}")
        for ours, param in (("seed", "seed"), ("num_train and num_eval", "size")):
            if param in params:
                raise ConfigError(f"{self._key}.params.{param} is set by {self._key}.{ours}; remove it from params")
        known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
        for param in params:
            if param not in known:
                raise ConfigError(f"{self._key}.params.{param} is not a setting of {task}; it has: {', '.join(known)}")
        try:
            return create_dataset(task, seed=seed, size=size, **params)
        except Exception as error:  # tasks check their settings by assert, ValueError or whatever fails first
            raise ConfigError(f"{self._key}.params={params} is refused by {task}: {_reason(error)}") from error

    def _entry(self, dataset: Any, index: int) -> dict[str, Any]:
        try:
            return dataset[index]
        except Exception as error:  # settings that passed the task's checks and yet cannot be generated from
            raise ConfigError(
                f"{self._key}: {self._config.task} with params={self._config.params} cannot generate question {index}: "
                f"{_reason(error)}"
            ) from error

    def _question(self, entry: dict[str, Any]) -> _Question:
        reference = dict(entry)
        if entry["answer"] is not None:
            reference["completion"] = format_answer(str(entry["answer"]), self._config.answer_format)
        messages = [{"role": "user", "content": entry["question"]}]
        return _Question(messages=_with_instruction(messages, self._config), reference=reference)


class _RowSource:
    """Questions that are rows of a table; read on demand, after one pass that says which rows are held out.

    A row is a `prompt` (text or chat list) with an `answer`, or `messages` whose last is an assistant's: its text is
    demonstrated and, unless there is an `answer` too, the reference. A text that already states its answer in the
    domain's format is demonstrated as it stands, any other is put into the format. Text before `####` (with verifier
    number) and a leading <think> block are reasoning. Held out are the rows of `eval_path`, or those whose question
    hashes below `eval_fraction`: the same ones in every domain and run, whatever the file holds beside them.
    """

    def __init__(self, name: str, config: DomainConfig) -> None:
        self._key = f"data.domains.{name}"
        self._config = config
        self._where = config.where or name
        assert config.path is not None
        self._path = config.path
        self._rows, self._columns = self._open(config.path, "path")
        self.held_out: list[tuple[int, _Question]] = []
        texts: set[str] = set()  # of every held-out question, whether or not num_eval has room for it
        if config.eval_path is not None:
            rows, columns = self._open(config.eval_path, "eval_path")
            for index in self._choose(rows, columns, config.eval_path):
                self._hold_out(index, self._parse(rows, columns, config.eval_path, index), texts)
        self._train: list[int] = []
        chosen = self._choose(self._rows, self._columns, config.path)
        for rank, index in enumerate(chosen):
            question = self._parse(self._rows, self._columns, config.path, index)
            text = _normalise(question.reference["question"])
            if config.eval_path is None and stable_hash("held out", text) < config.eval_fraction * 2**64:
                self._hold_out(index, question, texts)
            elif text not in texts and rank < config.num_train:
                self._train.append(index)
        self.train_size = len(self._train)
        if not self.held_out:
            raise ConfigError(
                f"{self._key}.eval_fraction={config.eval_fraction} holds out an empty dataset: none of the "
                f"{len(chosen)} rows of {config.path!r}; raise it or set {self._key}.eval_path"
            )
        if not self._train:
            raise ConfigError(
                f"{self._key}.path={config.path!r} is an empty dataset for training: all of its {len(chosen)} rows are "
                "held out"
            )
        _warn_num_eval(self._key, config, len(self.held_out), "distinct held-out questions")

    def _hold_out(self, index: int, question: _Question, texts: set[str]) -> None:
        text = _normalise(question.reference["question"])
        if text not in texts and len(self.held_out) < self._config.num_eval:
            self.held_out.append((index, question))
        texts.add(text)

    def train(self, index: int) -> _Question:
        return self._parse(self._rows, self._columns, self._path, self._train[index])

    def _open(self, path: str, field: str) -> tuple[Any, dict[str, str]]:
        """The table at `path`, cut to the columns we read, and our column names -> its own."""
        import datasets  # a second to import; runs on generated tasks need not pay

        kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(os.path.splitext(path)[1].lower())
        if kind is not None and not os.path.isfile(path):
            raise ConfigError(f"{self._key}.{field}={path!r} does not exist")
        if os.path.isfile(path) and kind is None:
            raise ConfigError(f"{self._key}.{field}={path!r} is not a .jsonl, .json or .parquet file")
        if kind is not None and os.path.getsize(path) == 0:
            raise ConfigError(f"{self._key}.{field}={path!r} is an empty dataset")
        split = self._config.split
        try:
            if kind is not None:
                rows = datasets.load_dataset(kind, data_files={split.partition("[")[0]: path}, split=split)
            else:
                repository, _, subset = path.partition(":")
                rows = datasets.load_dataset(repository, subset or None, split=split)
        except Exception as error:  # file formats, networks and missing splits each have exceptions of their own
            raise ConfigError(
                f"{self._key}.{field}={path!r} (split {split!r}) cannot be read: {_reason(error.__cause__ or error)}"
            ) from error
        assert isinstance(rows, datasets.Dataset)
        if len(rows) == 0:
            raise ConfigError(f"{self._key}.{field}={path!r} is an empty dataset")
        columns = self._find_columns(rows.column_names, path)
        return rows.select_columns(sorted({column.partition(".")[0] for column in columns.values()})), columns

    def _find_columns(self, present: list[str], path: str) -> dict[str, str]:
        for ours in self._config.columns:
            if ours not in _COLUMNS:
                raise ConfigError(
                    f"{self._key}.columns.{ours} is not a column we read; those are {', '.join(_COLUMNS)}"
                )
        found: dict[str, str] = {}
        for ours, usual in _COLUMNS.items():
            named = self._config.columns.get(ours)
            for column in (named,) if named else usual:
                if column.partition(".")[0] in present:
                    found.setdefault(ours, column)
            if named and ours not in found:
                self._missing(named, f"{self._key}.columns.{ours}", present, path)
        if "prompt" not in found and "messages" not in found:
            self._missing("prompt", f"or 'messages', and {self._key}.columns renames neither", present, path)
        if "answer" not in found and "messages" not in found:
            self._missing("answer", f"and {self._key}.columns.answer names no other", present, path)
        if self._config.where and "data_source" not in found:
            self._missing("data_source", f"which {self._key}.where={self._config.where!r} selects by", present, path)
        asked = "messages" in self._config.columns and "prompt" not in self._config.columns
        if "messages" in found and (asked or not {"prompt", "answer"} <= found.keys()):
            found.pop("prompt", None)
        else:
            found.pop("messages", None)
        return found

    def _missing(self, column: str, why: str, present: list[str], path: str) -> None:
        raise ConfigError(f"{self._key}: {path!r} has no column {column!r} ({why}); it has: {', '.join(present)}")

    def _choose(self, rows: Any, columns: dict[str, str], path: str) -> list[int]:
        """Indices of the rows whose data_source is ours; of all rows when there is no such column."""
        if "data_source" not in columns:
            return list(range(len(rows)))
        root = columns["data_source"].partition(".")[0]
        sources = [_reach({root: value}, columns["data_source"]) for value in rows[root]]
        chosen = [index for index, source in enumerate(sources) if source == self._where]
        if not chosen:
            raise ConfigError(
                f"{self._key}.where={self._where!r} selects an empty dataset: {columns['data_source']!r} of {path!r} "
                f"has: {', '.join(sorted({str(source) for source in sources})[:20])}"
            )
        return chosen

    def _parse(self, rows: Any, columns: dict[str, str], path: str, index: int) -> _Question:
        row = rows[index]
        value = {ours: _reach(row, column) for ours, column in columns.items()}
        place = f"{self._key}: row {index} of {path!r}"
        answer = value.get("answer")
        if isinstance(answer, (list, dict)):
            raise ConfigError(
                f"{place}: column {columns['answer']!r} is a {type(answer).__name__}; it must be one value"
            )
        explicit = None if answer is None else str(answer)
        reasoning = value.get("reasoning") or ""
        if "messages" in columns:
            messages = _messages(value["messages"], place, columns["messages"])
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise ConfigError(
                    f"{place}: the last of {columns['messages']!r} must be an assistant's answer to others"
                )
            target = messages.pop()
            completion = target["content"]
            reasoning = reasoning or target.get("reasoning_content", "")
        else:
            messages = _messages(value["prompt"], place, columns["prompt"])
            if explicit is None:
                raise ConfigError(f"{place}: column {columns['answer']!r} is empty")
            completion, explicit = explicit, None
        if completion.startswith(THINK) and END_THINK in completion:
            inside, _, completion = completion.removeprefix(THINK).partition(END_THINK)
            reasoning, completion = reasoning or inside.strip(), completion.strip()
        if verifier_name(self._config) == "number" and "####" in completion:  # GSM8K: the steps, ####, the number
            steps, _, completion = completion.rpartition("####")
            reasoning, completion = reasoning or steps.strip(), completion.strip()
        stated = extract_answer(completion, self._config.answer_format)
        if stated is None and explicit is not None:
            completion = f"{completion}\n\n{format_answer(explicit, self._config.answer_format)}"
        elif stated is None:
            stated, completion = completion, format_answer(completion, self._config.answer_format)
        reference = {
            "question": "\n".join(message["content"] for message in messages if message["role"] != "system"),
            "answer": stated if explicit is None else explicit,
            "metadata": value.get("metadata") or {},
            "completion": completion,
            "reasoning": reasoning,
        }
        return _Question(messages=_with_instruction(messages, self._config), reference=reference)


def _messages(value: Any, place: str, column: str) -> list[dict[str, str]]:
    """A text as one user message, or a list of messages checked and rid of empty fields."""
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place}: column {column!r} must be a text or a list of messages, not {value!r:.60}")
    messages: list[dict[str, str]] = []
    for message in value:
        fields = {k: v for k, v in message.items() if isinstance(v, str)} if isinstance(message, dict) else {}
        if not {"role", "content"} <= fields.keys():
            raise ConfigError(f"{place}: a message of {column!r} must have text as role and content: {message!r:.60}")
        messages.append(fields)
    return messages


def _with_instruction(messages: list[dict[str, str]], config: DomainConfig) -> list[dict[str, str]]:
    """The messages with the domain's instruction as system text, after the system text they may already have."""
    instruction = format_instruction(config)
    if instruction is None:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": instruction}, *messages]
    return [{"role": "system", "content": f"{messages[0]['content']}\n\n{instruction}"}, *messages[1:]]


def _reach(row: dict[str, Any], column: str) -> Any:
    """row["a"]["b"] for the column "a.b"; None where a level is missing."""
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _normalise(text: str) -> str:
    """Two questions with the same normalised text are the same question: case and white space do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _warn_num_eval(key: str, config: DomainConfig, num_found: int, what: str) -> None:
    if num_found < config.num_eval:
        _log.warning("%s.num_eval=%d, but there are %d %s; using those", key, config.num_eval, num_found, what)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
