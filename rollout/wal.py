"""The write-ahead log of one worker's batch of requests: what was asked, every token as it was drawn, what has ended.

A file is a magic number and a chain of frames. The first frame says whose batch it is, the second what was asked;
then each decoding step appends one frame with the tokens of all active requests, and one for those that ended in it.
Every frame carries the CRC-32 of itself and of all frames before it, so a flipped bit, a frame of another file or one
out of place is found where it stands. A file that ends in the middle of a frame was cut there: that frame is dropped,
and all before it hold.

    magic (8 bytes), then frames of: length of payload u32, kind u8, CRC-32 of these five bytes u32,
                                     payload, CRC-32 chained over the whole file's heads and payloads u32

Two policies decide what a logged token survives. "process": it is handed to the operating system before it counts, and
outlives the worker, however it dies. "machine": it is on the disk before it counts, and outlives a power failure; that
costs one flush of the disk per decoding step, which `scripts/bench rollout` measures. Numbers are little-endian.

A log is of one batch; the next batch replaces it. What a sampler was at when it ended is set aside for the one after
it, which may ask the same policy for the same. Left out: who writes when (`engine`) and who reads when (`worker`), and
the experts of routing replay: whoever goes on reads the logged tokens anyway, which records them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from opd.config import SamplingConfig
from opd.types import FinishReason, VersionSpan
from rollout.request import NO_SAMPLES, Request, Samples, by_owner, concatenate

logger = logging.getLogger(__name__)

MAGIC = b"OPDWAL1\n"
ASIDE = 2  # logs of a worker that wait to be taken up
HEAD, CHECK = struct.Struct("<IBI"), struct.Struct("<I")
IDENTITY, REQUESTS, TOKENS, TRUNCATED_TOKENS, ENDS = range(1, 6)
REASONS: tuple[FinishReason, ...] = ("stop", "length")

Durability = Literal["process", "machine"]


class LogDamaged(ValueError):
    """A log that cannot be used; the message names the file, the place in it and what is wrong."""


@dataclass(slots=True, kw_only=True, frozen=True)
class LogKey:
    """Which batch a log is of, and where it lies."""

    path: str
    run: str  # one sampler's life: no two of them share it, in the same folder or not
    worker: str
    batch: int  # counts the sampler's calls

    def aside(self, policy_version: int) -> str:
        """Where the log lies that an earlier sampler left at `path` when it drew under that version."""
        return f"{self.path}.{policy_version}"


@dataclass(slots=True, kw_only=True, frozen=True)
class LoggedBatch:
    """What a log holds. `sampled[i]` and `reasons[i]` belong to `requests[i]`, which come without their tokens."""

    run: str
    worker: str
    batch: int
    policy_version: int  # tokens of this log were drawn under it, but those that requests came with
    policy: str  # digest of what draws: weights, architecture, context, stop tokens; empty where none was given
    seed: int
    sampling: dict[str, Any]
    requests: tuple[Request, ...]
    sampled: tuple[Samples, ...]
    reasons: tuple[FinishReason | None, ...]  # None: unfinished
    torn_bytes: int  # at the end of the file, dropped

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sampled))

    def asks(self) -> tuple[Any, ...]:
        """What was to be drawn, and by whom: two logs that agree in it would end up with the same tokens."""
        requests = [(request.trajectory_id, request.token_ids, request.max_new_tokens) for request in self.requests]
        return self.policy, self.seed, self.sampling, requests

    def resumed(self, requests: Sequence[Request], sampling: SamplingConfig, seed: int) -> list[Request]:
        """The requests with what the log has of each. Raises LogDamaged for one that was logged with another prompt,
        and for a batch that was sampled in another way."""
        if (asked := (dataclasses.asdict(sampling), seed)) != (self.sampling, self.seed):
            raise LogDamaged(
                f"batch {self.batch} of {self.worker!r} was logged with (sampling, seed) = "
                f"{(self.sampling, self.seed)}, not {asked}"
            )
        logged = {request.trajectory_id: index for index, request in enumerate(self.requests)}
        resumed = []
        for request in requests:
            index = logged.get(request.trajectory_id)
            if index is None:
                resumed.append(request)
                continue
            if self.requests[index].token_ids != request.token_ids:
                raise LogDamaged(f"request {request.trajectory_id} was logged with another prompt")
            spans, before = self.requests[index].version_spans, len(self.requests[index].sampled)
            if len(self.sampled[index]) > before and not (spans and spans[-1].policy_version == self.policy_version):
                start = len(request.token_ids) + before
                spans = (*spans, VersionSpan(start=start, policy_version=self.policy_version))
            resumed.append(dataclasses.replace(request, sampled=self.sampled[index], version_spans=spans))
        return resumed


class Log:
    """The log of a batch, open for writing. A call returns when the record is as durable as the policy asks."""

    def __init__(
        self,
        key: LogKey,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        policy_version: int,
        seed: int,
        durability: Durability,
        policy: str = "",
    ) -> None:
        """Begins the log with the requests and what they come with, in place of whatever log is at `key.path`. `policy`
        is a digest of what draws, by which `taken_up` knows it again.

        An earlier log stays until the new one is complete. Raises LogDamaged for a file there that is no log of ours,
        which is left alone, and RuntimeError naming the file when it cannot be written.
        """
        self.path, self.durability = key.path, durability
        self._descriptor, self._size, self._check = -1, 0, 0
        self._num_tokens = sum(len(request.sampled) for request in requests)
        _refuse_foreign(key.path)
        identity = {
            "run": key.run,
            "worker": key.worker,
            "batch": key.batch,
            "policy_version": policy_version,
            "policy": policy,
            "seed": seed,
            "sampling": dataclasses.asdict(sampling),
        }
        frames = [self._frame(IDENTITY, json.dumps(identity).encode()), self._frame(REQUESTS, _described(requests))]
        unfinished = f"{key.path}.unfinished"
        try:
            os.makedirs(os.path.dirname(os.path.abspath(key.path)), exist_ok=True)
            self._descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self._write(MAGIC + b"".join(frames))
            os.replace(unfinished, key.path)
            if durability == "machine":
                _flush_folder(key.path)
        except OSError as error:
            self.close()
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise RuntimeError(
                f"{key.path} cannot be written: {error.strerror}. What an earlier log there held of this batch "
                f"({self._num_tokens} tokens) is not lost; make room on that disk and let this user write there, or do "
                "without logs (rollout.wal=none)"
            ) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, owners: np.ndarray, samples: Samples, ended: np.ndarray, stopped: np.ndarray) -> None:
        """One decoding step. Request owners[i] (its place among the requests) drew samples[i]; the requests at
        ended (integers [m]) are complete, by a stop token where `stopped` (bool [m]) says so, else by their limit.

        Raises RuntimeError naming the file when the disk does not take it; the log then ends with the step before.
        """
        frames = [self._frame(*_columns(owners, samples))]
        if len(ended):
            reasons = np.where(stopped, REASONS.index("stop"), REASONS.index("length")).astype(np.uint8)
            frames.append(self._frame(ENDS, _bytes(ended, "<i4") + reasons.tobytes()))
        try:
            self._write(b"".join(frames))
        except OSError as error:
            with contextlib.suppress(OSError):  # reading drops a torn end too
                os.ftruncate(self._descriptor, self._size)
            raise RuntimeError(
                f"{self.path} cannot grow beyond {self._size} bytes: {error.strerror}. It holds the {self._num_tokens} "
                "tokens sampled so far in this batch, and none is lost; make room on that disk"
            ) from error
        self._num_tokens += len(samples)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _frame(self, kind: int, payload: bytes) -> bytes:
        head = struct.pack("<IB", len(payload), kind)
        head += CHECK.pack(zlib.crc32(head))
        self._check = zlib.crc32(payload, zlib.crc32(head, self._check))
        return head + payload + CHECK.pack(self._check)

    def _write(self, record: bytes) -> None:
        rest = memoryview(record)
        while len(rest):  # a disk that fills up takes a part first
            rest = rest[os.write(self._descriptor, rest) :]
        if self.durability == "machine":
            os.fdatasync(self._descriptor)
        self._size += len(record)


def log_complete(log: Log | None, reasons: Mapping[int, FinishReason]) -> None:
    """Says of requests that came complete that they are."""
    if log is not None and reasons:
        stopped = np.array([reason == "stop" for reason in reasons.values()])
        log.append(np.empty(0, np.int64), NO_SAMPLES, np.array(list(reasons)), stopped)


def read_log(path: str | Path) -> LoggedBatch | None:
    """What a log holds, its torn tail left out; None for one that was cut before it said what was asked.

    Raises LogDamaged for a file that is no log and for one in which something was changed, FileNotFoundError for none.
    """
    data = Path(path).read_bytes()
    try:
        return _read(data, path)
    except LogDamaged:
        raise
    except (TypeError, ValueError, IndexError, KeyError, struct.error) as error:
        raise LogDamaged(f"{path} is sound but of no shape that this version reads: {error}") from error


def _read(data: bytes, path: str | Path) -> LoggedBatch | None:
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data) or not any(data):  # zeros: a machine that went down
            return None
        raise LogDamaged(f"{path} is not a write-ahead log of this program's: it begins with {data[:8]!r}")
    frames, torn_bytes = _frames(data, path)
    kinds = [kind for _, kind, _ in frames]
    if kinds[:2] != [IDENTITY, REQUESTS][: len(kinds)]:
        raise LogDamaged(f"{path}: its first frames are of the kinds {kinds[:2]}; {[IDENTITY, REQUESTS]} are expected")
    if len(frames) < 2:
        return None
    identity = {"policy": "", **_json(frames[0][2], path, frames[0][0])}
    if (expected := {"run", "worker", "batch", "policy_version", "policy", "seed", "sampling"}) != identity.keys():
        raise LogDamaged(f"{path} says of itself {', '.join(identity)}; {', '.join(sorted(expected))} are expected")
    if not isinstance(identity["policy_version"], int):
        raise LogDamaged(f"{path} has the policy version {identity['policy_version']!r}; a whole number is expected")
    requests = _requests(frames[1][2], path)
    owners = [np.repeat(np.arange(len(requests)), [len(request.sampled) for request in requests])]
    steps = [request.sampled for request in requests]
    reasons: list[FinishReason | None] = [None] * len(requests)
    for place, kind, payload in frames[2:]:
        if kind in (TOKENS, TRUNCATED_TOKENS):
            owner, samples = _samples(kind, payload, path, place)
            owners.append(owner)
            steps.append(samples)
        elif kind == ENDS and len(payload) % 5 == 0:
            owner = np.frombuffer(payload, "<i4", len(payload) // 5)
        else:
            raise LogDamaged(f"{path}: the frame at byte {place} is of the unknown kind {kind}, or not of its size")
        if len(owner) and not 0 <= owner.min() <= owner.max() < len(requests):
            raise LogDamaged(f"{path}: the frame at byte {place} names a request that was never asked")
        if kind == ENDS:
            for index, reason in zip(owner.tolist(), payload[4 * len(owner) :], strict=True):
                reasons[index] = REASONS[reason]
    return LoggedBatch(
        **identity,
        requests=tuple(requests),
        sampled=tuple(by_owner(np.concatenate(owners), concatenate(steps), len(requests))),
        reasons=tuple(reasons),
        torn_bytes=torn_bytes,
    )


def read_batch(key: LogKey) -> LoggedBatch | None:
    """The log of just this batch; None where there is none yet, or the one of an earlier batch of the same worker.

    Raises LogDamaged for a log of another run or worker, and as `read_log` does.
    """
    found = _held(key.path)
    if found is None or (found.run, found.worker, found.batch) == (key.run, key.worker, key.batch):
        return found
    if (found.run, found.worker) == (key.run, key.worker) and found.batch < key.batch:
        return None
    raise LogDamaged(
        f"{key.path} is the log of batch {found.batch} of {found.worker!r} in run {found.run!r}, not of batch "
        f"{key.batch} of {key.worker!r} in run {key.run!r}"
    )


def taken_up(
    key: LogKey, requests: Sequence[Request], sampling: SamplingConfig, *, policy_version: int, seed: int, policy: str
) -> list[Request]:
    """The requests with what an earlier sampler's log has of them, if it drew by the same noise from the same policy in
    the same way: that is what would be drawn now. A log that cannot be read is said to be so, and not used."""
    try:
        found = _held(key.aside(policy_version))
    except (LogDamaged, OSError) as error:
        logger.warning("%s; its tokens are drawn again", error)
        return list(requests)
    wanted = (key.worker, policy_version, policy, seed, dataclasses.asdict(sampling))
    if found is None or (found.worker, found.policy_version, found.policy, found.seed, found.sampling) != wanted:
        return list(requests)
    drawn = {}
    for request, samples in zip(found.requests, found.sampled, strict=True):
        if len(samples) and all(span.policy_version == policy_version for span in request.version_spans):
            drawn[request.trajectory_id] = request.token_ids, request.max_new_tokens
    chosen = [
        index
        for index, request in enumerate(requests)
        if drawn.get(request.trajectory_id) == (request.token_ids, request.max_new_tokens) and not request.sampled
    ]
    taken = dict(zip(chosen, found.resumed([requests[index] for index in chosen], sampling, seed), strict=True))
    if taken:
        tokens = sum(len(request.sampled) for request in taken.values())
        logger.warning("%s goes on from %d tokens that an earlier run logged", key.worker, tokens)
    return [taken.get(index, request) for index, request in enumerate(requests)]


def _frames(data: bytes, path: str | Path) -> tuple[list[tuple[int, int, bytes]], int]:
    """(place in the file, kind, payload) of the complete frames, and the bytes of the incomplete one after them."""
    frames, at, check = [], len(MAGIC), 0
    while at < len(data):
        # A machine that went down may have left a length without the bytes: zeros to the end are a torn frame too.
        if at + HEAD.size > len(data) or not any(data[at:]):
            break
        length, kind, head_check = HEAD.unpack_from(data, at)
        if zlib.crc32(data[at : at + 5]) != head_check:
            raise LogDamaged(f"{path}: the head of the frame at byte {at} was changed (its checksum is wrong)")
        begin, end = at + HEAD.size, at + HEAD.size + length
        if end + CHECK.size > len(data):
            break
        payload = data[begin:end]
        check = zlib.crc32(payload, zlib.crc32(data[at:begin], check))
        if CHECK.unpack_from(data, end)[0] != check:
            if not any(data[end : end + CHECK.size]) and not any(data[end:]):
                break
            raise LogDamaged(
                f"{path}: the frame at byte {at} was changed, or belongs to another log (its checksum is wrong)"
            )
        frames.append((at, kind, payload))
        at = end + CHECK.size
    return frames, len(data) - at


def _described(requests: Sequence[Request]) -> bytes:
    """JSON for the words, one line, then the arrays: lengths of prompts, columns of what the requests come with."""
    words = [
        [
            request.trajectory_id,
            request.prompt_id,
            request.domain,
            request.max_new_tokens,
            [[span.start, span.policy_version] for span in request.version_spans],
        ]
        for request in requests
    ]
    owners = np.repeat(np.arange(len(requests)), [len(request.sampled) for request in requests])
    kind, columns = _columns(owners, concatenate([request.sampled for request in requests]))
    prompts = np.concatenate([np.empty(0, np.int32), *(np.asarray(request.token_ids) for request in requests)])
    sizes = np.array([len(request.token_ids) for request in requests], dtype=np.int32)
    text = json.dumps(words).encode() + b"\n"
    return text + bytes([kind]) + _bytes(sizes, "<i4") + _bytes(prompts, "<i4") + columns


def _requests(payload: bytes, path: str | Path) -> list[Request]:
    text, _, arrays = payload.partition(b"\n")
    words = _json(text, path, len(MAGIC))
    sizes = np.frombuffer(arrays, "<i4", len(words), 1)
    prompts = np.frombuffer(arrays, "<i4", int(sizes.sum()), 1 + 4 * len(words))
    rest = arrays[1 + 4 * (len(words) + len(prompts)) :]
    owners, samples = _samples(arrays[0], rest, path, len(MAGIC))
    sampled = by_owner(owners, samples, len(words))
    return [
        Request(
            trajectory_id=trajectory_id,
            prompt_id=prompt_id,
            domain=domain,
            token_ids=tuple(prompt.tolist()),
            max_new_tokens=max_new_tokens,
            sampled=own,
            version_spans=tuple(VersionSpan(start=start, policy_version=version) for start, version in spans),
        )
        for (trajectory_id, prompt_id, domain, max_new_tokens, spans), prompt, own in zip(
            words, np.split(prompts, sizes.cumsum()[:-1]) if len(words) else [], sampled, strict=True
        )
    ]


def _columns(owners: np.ndarray, samples: Samples) -> tuple[int, bytes]:
    """(kind, payload) of drawn tokens: 12 bytes each; with truncation 20, and 4 for every id that was kept."""
    columns = [_bytes(owners, "<i4"), _bytes(samples.token_ids, "<i4"), _bytes(samples.logprobs, "<f4")]
    if not samples.kept_counts.any():
        return TOKENS, b"".join(columns)
    columns += [_bytes(samples.untruncated_logprobs, "<f4"), _bytes(samples.kept_counts, "<i4")]
    count = CHECK.pack(len(samples))  # what remains after the columns are kept ids
    return TRUNCATED_TOKENS, b"".join((count, *columns, _bytes(samples.kept_ids, "<i4")))


def _samples(kind: int, payload: bytes, path: str | Path, place: int) -> tuple[np.ndarray, Samples]:
    """(owners [S], the samples) of a payload that `_columns` made."""
    try:
        if kind == TOKENS:
            owners, token_ids, logprobs = np.frombuffer(payload, "<i4").reshape(3, -1)
            logprobs = logprobs.view("<f4")
            samples = Samples(
                token_ids=token_ids,
                logprobs=logprobs,
                untruncated_logprobs=logprobs,
                kept_counts=np.zeros(len(owners), np.int32),
                kept_ids=NO_SAMPLES.kept_ids,
            )
            return owners, samples
        (count,) = CHECK.unpack_from(payload)
        columns = np.frombuffer(payload, "<i4", 5 * count, CHECK.size).reshape(5, count)
        samples = Samples(
            token_ids=columns[1],
            logprobs=columns[2].view("<f4"),
            untruncated_logprobs=columns[3].view("<f4"),
            kept_counts=columns[4],
            kept_ids=np.frombuffer(payload, "<i4", int(columns[4].sum()), CHECK.size + 20 * count),
        )
        return columns[0], samples
    except (ValueError, struct.error) as error:
        raise LogDamaged(f"{path}: the frame at byte {place} does not hold what its kind {kind} says") from error


def _bytes(values: np.ndarray, dtype: str) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _json(payload: bytes, path: str | Path, place: int) -> Any:
    try:
        return cast(Any, json.loads(payload))
    except ValueError as error:
        raise LogDamaged(f"{path}: the frame at byte {place} is not the JSON it should be") from error


def set_aside(key: LogKey) -> None:
    """Moves the log that an earlier sampler left, if there is one that holds a token, to where `taken_up` looks for it.

    The last ASIDE of them stay, each of its version; of two of one batch, the one with more tokens. One that was
    changed goes to `<path>.damaged`. Raises LogDamaged for a file that is no log of ours, which is left alone.
    """
    _refuse_foreign(key.path)
    try:
        found = _held(key.path)
    except LogDamaged as error:
        logger.warning("%s; it is kept as %s.damaged", error, key.path)
        os.replace(key.path, f"{key.path}.damaged")
        return
    if found is None or not found.num_tokens:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(key.path)
        return
    place = key.aside(found.policy_version)
    _refuse_foreign(place)
    try:
        other = _held(place)
    except LogDamaged:
        other = None
    if other is not None and other.asks() == found.asks() and other.num_tokens > found.num_tokens:
        os.unlink(key.path)
    else:
        os.replace(key.path, place)
    for _, path in sorted(((os.path.getmtime(path), path) for _, path in _asides(key)), reverse=True)[ASIDE:]:
        os.unlink(path)


def drop_asides(key: LogKey, policy_version: int) -> None:
    """Removes logs that were set aside, of versions before this one: nobody asks for them any more."""
    for version, path in _asides(key):
        if version < policy_version:
            os.unlink(path)


def _asides(key: LogKey) -> list[tuple[int, str]]:
    """Logs that were set aside, with their versions; other files of such names are nobody's business here."""
    found = []
    for path in glob.glob(f"{glob.escape(key.path)}.*"):
        version = path.removeprefix(f"{key.path}.")
        if version.isdecimal() and _what_is_foreign(path) is None:
            found.append((int(version), path))
    return found


def _held(path: str) -> LoggedBatch | None:
    """As `read_log`, and None where there is no file."""
    try:
        return read_log(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _refuse_foreign(path: str) -> None:
    if (reason := _what_is_foreign(path)) is not None:
        raise LogDamaged(f"{path} is in the way: {reason}; it is left alone, move it away")


def _what_is_foreign(path: str) -> str | None:
    """What makes a file none of our logs; None for one that is, and for no file."""
    try:
        with open(path, "rb") as file:
            begin = file.read(len(MAGIC))
            # Zeros are a log of which a machine that went down kept the size.
            is_ours = MAGIC.startswith(begin) or not any(begin + file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    return None if is_ours else "it is not a write-ahead log of this program's"


def _flush_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
