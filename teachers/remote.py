"""Teachers behind an endpoint: a server that scores a prompt and returns log-probabilities of its tokens.

The one idea: the trajectory's own ids go out as the prompt, and every number that comes back is checked before it
counts: as many positions as tokens, the trajectory's tokens at each, finite log-probabilities, no more mass than one.
A request that fails, comes late or comes back wrong is tried again on the next replica; one that no replica answers
raises, naming teacher and servers, and nothing of the step is lost: whoever holds the trajectories asks again later.

Endpoints know few probabilities of a position, never all: losses over the whole vocabulary need `teachers.local`. The
key is read from the environment, is sent in one header, and is in no message. Speaks vLLM's /completions with
`prompt_logprobs` and SGLang's /generate. Waits: for answers, at most `timeout_seconds` each. Left out: losses.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from opd.config import ConfigError, TeacherConfig
from opd.types import TeacherLogprobs, Trajectory

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.25  # before the second attempt; each further pause is twice as long ...
LONGEST_PAUSE_SECONDS = 15.0  # ... up to this, which bounds what a server may ask for too
CONNECT_SECONDS = 10.0
AVOID_SECONDS = 30.0  # a replica that failed is asked again only then, if there are others
MASS_TOLERANCE = 1e-3  # by which the probabilities of a position may exceed 1, rounding included
UNLIKELY = -10.0  # nats: log-probabilities below it are taken as this when answers are compared
ANSWER_BYTES = 1 << 30  # of one answer; more is no list of log-probabilities
SHOWN_CHARACTERS = 200  # of an answer, in messages


class TeacherError(RuntimeError):
    """A remote teacher has not answered, or not with log-probabilities. The trajectories may be scored again."""


class TeacherAway(TeacherError):
    """None of its servers has answered as it should, and another time one may."""


class _Bad(Exception):
    """One attempt failed; `is_final`: so would another on this server; `pause_seconds`: what the server asks for."""

    def __init__(self, why: str, *, is_final: bool = False, pause_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.is_final, self.pause_seconds = is_final, pause_seconds


@dataclass(slots=True, kw_only=True, frozen=True)
class _Scores:
    """Of one prompt of T tokens, positions 1 to T - 1: entry t speaks of token t."""

    logprobs: np.ndarray  # float32 [T], 0 at index 0
    top_ids: np.ndarray  # int32 [T, k]
    top_logprobs: np.ndarray  # float32 [T, k]


class RemoteTeacher:
    """One teacher and its replicas. Methods may be called by one thread at a time; requests go out in parallel."""

    def __init__(self, name: str, teacher: TeacherConfig, vocab_size: int | None = None) -> None:
        """Opens no connection. `vocab_size`: entries of the tokenizer; ids beyond it are not believed. Raises
        ConfigError when the environment variable of the key is not set."""
        remote = teacher.remote
        self.name, self._remote, self._vocab_size = name, remote, vocab_size
        self._urls = [url.rstrip("/") for url in (teacher.path, *remote.replicas)]
        self._key = None
        if remote.api_key_env is not None:
            self._key = os.environ.get(remote.api_key_env)
            if not self._key:
                raise ConfigError(
                    f"teachers.{name}.remote.api_key_env={remote.api_key_env}: that environment variable is not set"
                )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(remote.timeout_seconds, connect=min(CONNECT_SECONDS, remote.timeout_seconds))
        limits = httpx.Limits(max_connections=remote.concurrency, max_keepalive_connections=remote.concurrency)
        # No redirects: they could carry the prompt to a server that nobody named.
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False)
        self._threads = ThreadPoolExecutor(remote.concurrency, thread_name_prefix=f"teacher {name}")
        self._models: dict[str, str] = {}  # url -> the model's name there
        self._avoid_until = dict.fromkeys(self._urls, 0.0)
        self._lock = threading.Lock()
        self._reference: tuple[list[int], _Scores] | None = None  # a question and the answer all replicas gave
        self._num_scorings = 0

    def score(self, trajectories: Sequence[Trajectory], weight: float) -> list[TeacherLogprobs]:
        """One signal per trajectory, in the order given. Raises TeacherError, naming the teacher and what each server
        did, when a trajectory stays without an answer, when replicas disagree, or when one answers a question of
        before in another way."""
        self._check_same(trajectories)
        futures = {
            number: self._threads.submit(self._ask, _prompt(trajectory), number, trajectory.id)
            for number, trajectory in enumerate(trajectories)
            if trajectory.num_loss_tokens
        }
        try:
            answers = {number: future.result() for number, future in futures.items()}
        finally:
            for future in futures.values():
                future.cancel()
        signals: list[TeacherLogprobs] = []
        for number, trajectory in enumerate(trajectories):
            at = trajectory.loss_mask.nonzero()[0]
            scores = answers.get(number) or _nothing(self._remote.top_k)
            signals.append(
                TeacherLogprobs(
                    teacher=self.name,
                    weight=weight,
                    logprobs=scores.logprobs[at],
                    top_ids=scores.top_ids[at],
                    top_logprobs=scores.top_logprobs[at],
                )
            )
        return signals

    def agree(self, token_ids: Sequence[int]) -> None:
        """Asks every replica the same prompt, of at least two tokens, and keeps the answer as what they must go on
        saying. Raises TeacherError, naming servers and the largest difference, unless all are within `tolerance`."""
        prompt = list(token_ids)
        first: _Scores | None = None
        for url in self._urls:
            scores = self._ask(prompt, self._urls.index(url), "the agreement of its replicas", only=url)
            if first is None:
                first = scores
            elif (gap := _largest_gap(first, scores)) > self._remote.tolerance:
                raise TeacherError(
                    f"teacher {self.name!r}: {self._urls[0]} and {url} differ by up to {gap:.4g} nats on the same "
                    f"prompt of {len(prompt)} tokens (allowed: {self._remote.tolerance:g}); they do not serve the same "
                    "model in the same way"
                )
        assert first is not None
        self._reference = (prompt, first)

    def tokenize(self, text: str) -> tuple[int, ...] | None:
        """The server's ids of a text, no special tokens added; None where it has no such service. Raises TeacherError
        when it does not answer."""
        body: dict[str, Any] = {"prompt": text, "add_special_tokens": False}
        if self._remote.server == "vllm":
            body["model"] = self._model(self._urls[0])
        root = self._urls[0].removesuffix("/v1")
        try:
            answer = self._post(f"{root}/tokenize", body)
        except _Bad as bad:
            if bad.is_final:
                return None
            raise TeacherError(f"teacher {self.name!r}: {self._urls[0]} does not answer: {bad}") from None
        ids = answer.get("tokens")
        return tuple(ids) if isinstance(ids, list) and all(type(token) is int for token in ids) else None

    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together that every replica takes; None where they do not say. Raises
        TeacherError when one does not answer."""
        found: list[int] = []
        for url in self._urls if self._remote.server == "vllm" else ():
            try:
                served = self._served(url)
            except _Bad as bad:
                raise TeacherError(f"teacher {self.name!r}: {url} does not answer: {bad}") from None
            found += [room for entry in served if type(room := entry.get("max_model_len")) is int]
        return min(found, default=None)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    # --- asking -------------------------------------------------------------------------------------------------------

    def _check_same(self, trajectories: Sequence[Trajectory]) -> None:
        """At the first scoring, that all replicas agree; at each later one, that one of them still says the same."""
        if self._reference is None:
            shortest = min(
                (trajectory for trajectory in trajectories if trajectory.num_loss_tokens),
                key=lambda trajectory: len(trajectory.token_ids),
                default=None,
            )
            if shortest is not None:
                self.agree(_prompt(shortest))
            return
        prompt, expected = self._reference
        self._num_scorings += 1
        scores = self._ask(prompt, self._num_scorings, "a question of before")
        if (gap := _largest_gap(expected, scores)) > self._remote.tolerance:
            raise TeacherError(
                f"teacher {self.name!r}: a server of {', '.join(self._urls)} answers a prompt that it has scored "
                f"before with log-probabilities that differ by up to {gap:.4g} nats (allowed: "
                f"{self._remote.tolerance:g}); its model was changed, or its scores do not repeat"
            )

    def _ask(self, prompt: list[int], number: int, subject: str, only: str | None = None) -> _Scores:
        """One prompt's scores, from `only` or from any replica; `number` spreads prompts over them."""
        failures: list[str] = []
        urls = [only] if only is not None else list(self._urls)
        for attempt in range(self._remote.max_retries + 1):
            url = self._pick(urls, number + attempt)
            try:
                return self._request(url, prompt)
            except _Bad as bad:
                failures.append(f"{url}: {bad}")
                log.warning("teacher %s, attempt %d on %s: %s", self.name, attempt + 1, subject, failures[-1])
                with self._lock:
                    self._avoid_until[url] = time.monotonic() + AVOID_SECONDS
                if bad.is_final:
                    urls.remove(url)
                    if not urls:
                        break
                elif attempt < self._remote.max_retries:
                    pause = max(FIRST_PAUSE_SECONDS * 2**attempt, bad.pause_seconds)
                    time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        seen = "; ".join(dict.fromkeys(failures))
        raise (TeacherAway if urls else TeacherError)(
            f"teacher {self.name!r} could not score {subject} in {len(failures)} attempts: {seen}"
        ) from None

    def _pick(self, urls: Sequence[str], number: int) -> str:
        """One of `urls` that has not failed of late, in turn; if all have, the one that did so longest ago."""
        now = time.monotonic()
        with self._lock:
            healthy = [url for url in urls if self._avoid_until[url] <= now]
            return healthy[number % len(healthy)] if healthy else min(urls, key=self._avoid_until.__getitem__)

    def _request(self, url: str, prompt: list[int]) -> _Scores:
        top_k = self._remote.top_k
        if self._remote.server == "sglang":
            body: dict[str, Any] = {
                "input_ids": prompt,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": top_k,
            }
            return _checked(prompt, _sglang_entries, self._post(f"{url}/generate", body), top_k, self._vocab_size)
        body = {
            "model": self._model(url),
            "prompt": prompt,
            "max_tokens": 1,  # the least that is allowed; what it says is not looked at
            "temperature": 0.0,
            "prompt_logprobs": top_k,
            "add_special_tokens": False,
        }
        return _checked(prompt, _vllm_entries, self._post(f"{url}/completions", body), top_k, self._vocab_size)

    def _model(self, url: str) -> str:
        """The model's name at a replica: the configured one, or the only one there."""
        if self._remote.model is not None:
            return self._remote.model
        if url not in self._models:
            names = [entry.get("id") for entry in self._served(url)]
            if len(names) != 1 or not isinstance(names[0], str):
                shown = ", ".join(map(str, names)) or "none"
                why = f"serves {len(names)} models ({shown}); name one in teachers.{self.name}.remote.model"
                raise _Bad(why, is_final=True)
            self._models[url] = names[0]
        return self._models[url]

    def _served(self, url: str) -> list[dict[str, Any]]:
        """The models at a replica, as it lists them."""
        served = self._exchange("GET", f"{url}/models", None).get("data")
        return [entry for entry in served if isinstance(entry, dict)] if isinstance(served, list) else []

    def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._exchange("POST", url, body)

    def _exchange(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request and its whole answer, a JSON object, within `timeout_seconds`. Raises _Bad."""
        deadline = time.monotonic() + self._remote.timeout_seconds
        try:
            with self._client.stream(method, url, json=body) as response:
                parts: list[bytes] = []
                size = 0
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    # httpx bounds the wait for each part only: a server that drips would never be late.
                    if time.monotonic() > deadline:
                        raise _Bad(f"no whole answer within {self._remote.timeout_seconds:g} s")
                    if size > ANSWER_BYTES:
                        raise _Bad(f"an answer of more than {ANSWER_BYTES} bytes", is_final=True)
        except httpx.TimeoutException as error:
            raise _Bad(f"no answer within {self._remote.timeout_seconds:g} s ({type(error).__name__})") from None
        except httpx.TransportError as error:
            raise _Bad(f"{type(error).__name__}: {self._shown(str(error))}") from None
        content = b"".join(parts)
        text = content.decode("utf-8", errors="replace")
        if response.status_code != 200:
            busy = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
            pause = response.headers.get("Retry-After", "")
            raise _Bad(
                f"HTTP {response.status_code}: {self._shown(text)}",
                is_final=not busy,
                pause_seconds=float(pause) if pause.isdigit() else 0.0,
            )
        try:
            answer = json.loads(content)
        except ValueError:
            raise _Bad(f"an answer that is not JSON: {self._shown(text)}") from None
        if not isinstance(answer, dict):
            raise _Bad(f"an answer that is a JSON {type(answer).__name__}, not an object")
        return answer

    def _shown(self, text: str) -> str:
        """The beginning of what a server said, on one line, without the key should it have repeated it."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return text[:SHOWN_CHARACTERS] or "(nothing)"


# ---- answers ---------------------------------------------------------------------------------------------------------

Position = tuple[float, list[tuple[float, int]]]  # log-prob of the prompt's token, and (log-prob, id) of others
Reader = Callable[[list[int], dict[str, Any]], list[Position]]


def _vllm_entries(prompt: list[int], answer: dict[str, Any]) -> list[Position]:
    """Positions 1 to T - 1 of `choices[0].prompt_logprobs`: one object per position, from id to logprob, rank and text,
    with the most likely tokens and the prompt's own; null at position 0."""
    listed = answer["choices"][0]["prompt_logprobs"]
    if len(listed) != len(prompt):
        raise _Bad(f"{len(listed)} positions for a prompt of {len(prompt)} tokens")
    positions: list[Position] = []
    for token, entries in zip(prompt[1:], listed[1:], strict=True):
        found = {int(key): float(entry["logprob"]) for key, entry in entries.items()}
        if token not in found:
            raise _Bad(f"position {len(positions) + 1} has no log-probability of the prompt's token {token}")
        positions.append((found[token], [(logprob, other) for other, logprob in found.items()]))
    return positions


def _sglang_entries(prompt: list[int], answer: dict[str, Any]) -> list[Position]:
    """Positions 1 to T - 1 of `meta_info.input_token_logprobs`, a list of [logprob, id, text], and of
    `input_top_logprobs`, a list of lists of those; the first logprob is null."""
    listed = answer["meta_info"]["input_token_logprobs"]
    if len(listed) != len(prompt):
        raise _Bad(f"{len(listed)} positions for a prompt of {len(prompt)} tokens")
    tops = answer["meta_info"].get("input_top_logprobs") or [None] * len(prompt)
    positions: list[Position] = []
    for token, entry, top in zip(prompt[1:], listed[1:], tops[1:], strict=True):
        if entry[1] != token:
            raise _Bad(f"position {len(positions) + 1} is token {entry[1]}, in the prompt it is {token}")
        positions.append((float(entry[0]), [(float(other[0]), int(other[1])) for other in top or ()]))
    return positions


def _checked(prompt: list[int], read: Reader, answer: dict[str, Any], top_k: int, vocab_size: int | None) -> _Scores:
    """Scores of an answer that is what it should be; raises _Bad for any other."""
    try:
        positions = read(prompt, answer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _Bad(f"an answer without log-probabilities of the prompt ({type(error).__name__}: {error})") from None
    scores = _nothing(top_k, len(prompt))
    for index, (logprob, others) in enumerate(positions, start=1):
        # Servers add the prompt's token to the k best where it is none of them: in the order of likelihood it is last.
        best = sorted(others, key=lambda entry: (-entry[0], entry[1] == prompt[index]))[:top_k]
        if len(best) < top_k:
            raise _Bad(f"position {index} has {len(best)} tokens where {top_k} were asked for")
        values = [logprob, *(value for value, _ in others)]
        if not all(math.isfinite(value) for value in values):
            raise _Bad(f"position {index} has a log-probability that is not finite")
        mass = sum(math.exp(min(value, 1.0)) for value, _ in others) if others else math.exp(min(logprob, 1.0))
        if mass > 1 + MASS_TOLERANCE:
            raise _Bad(f"position {index} has probabilities that sum to {mass:.4g}: these are no log-probabilities")
        for _, token in best:
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                raise _Bad(f"position {index} names token {token}; the tokenizer has {vocab_size} entries")
        scores.logprobs[index] = min(logprob, 0.0)
        if top_k:
            scores.top_logprobs[index] = [min(value, 0.0) for value, _ in best]
            scores.top_ids[index] = [token for _, token in best]
    return scores


def _nothing(top_k: int, num_tokens: int = 0) -> _Scores:
    return _Scores(
        logprobs=np.zeros(num_tokens, dtype=np.float32),
        top_ids=np.zeros((num_tokens, top_k), dtype=np.int32),
        top_logprobs=np.zeros((num_tokens, top_k), dtype=np.float32),
    )


def _prompt(trajectory: Trajectory) -> list[int]:
    """The ids to send: up to the last loss token, which is scored itself."""
    end = int(trajectory.loss_mask.nonzero()[0][-1]) + 1
    return trajectory.token_ids[:end].tolist()


def _largest_gap(a: _Scores, b: _Scores) -> float:
    """Largest difference, in nats, between what two answers say of the prompt's own tokens; of very unlikely ones,
    where servers' rounding is large, less is made."""
    likely = (np.maximum(scores.logprobs, UNLIKELY) for scores in (a, b))
    return float(np.abs(np.subtract(*likely)).max(initial=0.0))
