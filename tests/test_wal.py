"""The write-ahead log: whatever is cut off or changed, it says what it still holds, or that it cannot be trusted."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd.config import SamplingConfig
from opd.types import FinishReason, VersionSpan
from rollout.request import NO_SAMPLES, Request, Samples, by_owner, concatenate
from rollout.wal import MAGIC, Durability, Log, LogDamaged, LoggedBatch, LogKey, read_batch, read_log

SAMPLING = SamplingConfig(temperature=0.8, top_p=0.9, max_new_tokens=6)
Step = tuple[np.ndarray, Samples, np.ndarray, np.ndarray]


def drawn(rng: np.random.Generator, count: int, truncated: bool) -> Samples:
    logprobs = -rng.random(count).astype(np.float32)
    counts = rng.integers(1, 5, count).astype(np.int32) if truncated else np.zeros(count, np.int32)
    return Samples(
        token_ids=rng.integers(0, 1000, count).astype(np.int32),
        logprobs=logprobs,
        untruncated_logprobs=logprobs - rng.random(count).astype(np.float32) if truncated else logprobs,
        kept_counts=counts,
        kept_ids=rng.integers(0, 1000, counts.sum()).astype(np.int32),
    )


def requests_of(rng: np.random.Generator, truncated: bool = False) -> list[Request]:
    """Three of one batch: a fresh one, one that comes with two tokens, one with words that are not ASCII."""
    return [
        Request(trajectory_id="a#0@t", prompt_id="a", domain="d", token_ids=(5, 6, 7)),
        Request(
            trajectory_id="a#1@t",
            prompt_id="a",
            domain="d",
            token_ids=(5, 6, 7),
            max_new_tokens=4,
            sampled=drawn(rng, 2, truncated),
            version_spans=(VersionSpan(start=3, policy_version=1),),
        ),
        Request(trajectory_id="b\u00e9\n#0@t", prompt_id="b", domain="e", token_ids=(2,)),
    ]


def steps_of(rng: np.random.Generator, truncated: bool = False) -> list[Step]:
    none = np.empty(0, np.int64)
    everybody, two = np.array([2, 0, 1]), np.array([0, 2])
    return [
        (everybody, drawn(rng, 3, truncated), none, none.astype(bool)),
        (everybody, drawn(rng, 3, truncated), np.array([1]), np.array([True])),
        (two, drawn(rng, 2, truncated), none, none.astype(bool)),
        (two, drawn(rng, 2, truncated), two, np.array([False, True])),
    ]


def key(folder: Path, run: str = "run", worker: str = "rollout worker 0", batch: int = 3) -> LogKey:
    return LogKey(path=str(folder / "w.wal"), run=run, worker=worker, batch=batch)


def written(
    where: LogKey, requests: Sequence[Request], steps: Sequence[Step], durability: Durability = "process"
) -> list[int]:
    """Writes the log; its size after the requests and after every step."""
    sizes = []
    with Log(where, requests, SAMPLING, policy_version=2, seed=9, durability=durability) as log:
        sizes.append(os.path.getsize(where.path))
        for step in steps:
            log.append(*step)
            sizes.append(os.path.getsize(where.path))
    return sizes


def assert_holds(found: LoggedBatch | None, requests: Sequence[Request], steps: Sequence[Step]) -> None:
    """The log's requests have what these steps gave them, told by a loop over tokens."""
    assert found is not None
    assert (found.run, found.worker, found.batch) == ("run", "rollout worker 0", 3)
    assert (found.policy_version, found.seed, found.sampling) == (2, 9, dataclasses.asdict(SAMPLING))
    reasons: list[FinishReason | None] = [None] * len(requests)
    for index, request in enumerate(requests):
        own = [
            [request.sampled.token_ids.tolist(), request.sampled.logprobs.tolist()],
            [request.sampled.untruncated_logprobs.tolist(), request.sampled.kept_counts.tolist()],
            [request.sampled.kept_ids.tolist()],
        ]
        for owners, samples, ended, stopped in steps:
            kept = np.split(samples.kept_ids, samples.kept_counts.cumsum()[:-1])
            for row, owner in enumerate(owners.tolist()):
                if owner == index:
                    own[0][0].append(samples.token_ids[row].item())
                    own[0][1].append(samples.logprobs[row].item())
                    own[1][0].append(samples.untruncated_logprobs[row].item())
                    own[1][1].append(samples.kept_counts[row].item())
                    own[2][0].extend(kept[row].tolist())
            for owner, by_token in zip(ended.tolist(), stopped.tolist(), strict=True):
                reasons[owner] = "stop" if by_token else "length"
        got, bare = found.sampled[index], dataclasses.replace(request, sampled=NO_SAMPLES)
        assert found.requests[index] == bare
        assert found.requests[index].token_ids == request.token_ids
        assert own == [
            [got.token_ids.tolist(), got.logprobs.tolist()],
            [got.untruncated_logprobs.tolist(), got.kept_counts.tolist()],
            [got.kept_ids.tolist()],
        ]
    assert found.reasons == tuple(reasons)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("durability", ["process", "machine"])
def test_what_was_written_is_read(tmp_path: Path, truncated: bool, durability: Durability) -> None:
    rng = np.random.default_rng(0)
    requests, steps = requests_of(rng, truncated), steps_of(rng, truncated)
    written(key(tmp_path), requests, steps, durability)
    found = read_batch(key(tmp_path))
    assert_holds(found, requests, steps)
    assert found is not None and found.torn_bytes == 0 and found.num_tokens == 2 + 10
    assert os.listdir(tmp_path) == ["w.wal"]


def test_a_token_costs_twelve_bytes_and_a_step_a_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [Request(trajectory_id=str(i), prompt_id="p", domain="d", token_ids=(1,)) for i in range(500)]
    none = np.empty(0, np.int64)
    step = (np.arange(500), drawn(rng, 500, False), none, none.astype(bool))
    sizes = written(key(tmp_path), requests, [step, step])
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 12 * 500 + 13
    assert written(key(tmp_path), [], []) and assert_empty(read_batch(key(tmp_path)))


def assert_empty(found: LoggedBatch | None) -> bool:
    return found is not None and not found.requests and not found.num_tokens


@pytest.mark.parametrize("truncated", [False, True])
def test_cut_at_every_byte(tmp_path: Path, truncated: bool) -> None:
    rng = np.random.default_rng(1)
    requests, steps = requests_of(rng, truncated), steps_of(rng, truncated)
    sizes = written(key(tmp_path), requests, steps)
    whole = Path(key(tmp_path).path).read_bytes()
    for cut in range(len(whole) + 1):
        Path(key(tmp_path).path).write_bytes(whole[:cut])
        found = read_batch(key(tmp_path))
        complete = sum(size <= cut for size in sizes)
        if not complete:
            assert found is None
            continue
        assert found is not None
        # Between a step's tokens and its ends, the tokens are there and the ends are not: nothing is lost by that.
        extra = complete < len(sizes) and found.num_tokens > 2 + sum(len(step[1]) for step in steps[: complete - 1])
        held = list(steps[: complete - 1 + extra])
        if extra:
            owners, samples, ended, stopped = held[-1]
            held[-1] = (owners, samples, ended[:0], stopped[:0])
        assert_holds(found, requests, held)
        assert found.torn_bytes <= cut - sizes[complete - 1]
        # The torn bytes may as well have come out as zeros.
        Path(key(tmp_path).path).write_bytes(whole[: cut - found.torn_bytes] + bytes(700))
        assert_holds(read_batch(key(tmp_path)), requests, held)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    where = key(tmp_path)
    sizes = written(where, requests_of(rng), steps_of(rng))
    whole = Path(where.path).read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.randrange(8)
        Path(where.path).write_bytes(changed)
        with pytest.raises(LogDamaged, match="w.wal") as caught:
            read_log(where.path)
        if place < len(MAGIC):
            assert "is not a write-ahead log" in str(caught.value)
        elif place >= sizes[0]:
            before = sum(size <= place for size in sizes) - 1
            named = int(str(caught.value).split("at byte ")[1].split()[0])
            assert sizes[before] <= named <= place


def test_frames_of_another_log_or_out_of_place_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    requests, steps = requests_of(rng), steps_of(rng)
    where = key(tmp_path)
    sizes = written(where, requests, steps)
    whole = Path(where.path).read_bytes()
    (tmp_path / "other").mkdir()
    other = key(tmp_path / "other")
    assert written(other, requests, [steps_of(rng)[0], *steps[1:]]) == sizes
    foreign = Path(other.path).read_bytes()
    first, second, third = (slice(sizes[i], sizes[i + 1]) for i in (0, 1, 2))
    for damaged in (
        whole[: sizes[1]] + foreign[sizes[1] :],  # the rest of another log
        whole[: sizes[1]] + whole[first] + whole[second],  # a step twice
        whole[: sizes[1]] + whole[third],  # a step missing
        whole + b"x" * 40,
        whole[: sizes[0]] + struct.pack("<I", 10**6) + whole[sizes[0] + 4 :],  # a length beyond the end is no torn tail
    ):
        Path(where.path).write_bytes(damaged)
        with pytest.raises(LogDamaged, match=r"w\.wal: the (head of the )?frame at byte \d+"):
            read_log(where.path)


def test_a_log_of_another_program_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, dumps, removed = key(tmp_path), json.dumps, {"policy", "another"}

    def changed(value: Any) -> str:
        fields = value | {"another": 1} if isinstance(value, dict) else value
        return dumps({name: fields[name] for name in fields if name not in removed} if fields is not value else value)

    monkeypatch.setattr(json, "dumps", changed)
    rng = np.random.default_rng(6)
    written(where, requests := requests_of(rng), steps := steps_of(rng))  # from before policies were logged
    assert_holds(read_batch(where), requests, steps)
    for names in (set(), {"another", "seed"}):
        removed = names
        written(where, [], [])
        with pytest.raises(LogDamaged, match=r"w\.wal says of itself .*, worker, .*; .* are expected"):
            read_log(where.path)


@pytest.mark.parametrize(
    "value",
    [[1], None, {"policy_version": "../x"}, {"policy_version": None}],
)
def test_a_sound_log_of_another_shape_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict[str, Any] | list[int] | None
) -> None:
    where, dumps = key(tmp_path), json.dumps

    def changed(original: Any) -> str:
        if not isinstance(original, dict):
            return dumps(original)
        return dumps(original | value if isinstance(value, dict) else value)

    monkeypatch.setattr(json, "dumps", changed)
    written(where, [], [])
    with pytest.raises(LogDamaged, match=r"w\.wal (has the policy version|is sound but of no shape)"):
        read_log(where.path)
    monkeypatch.setattr(json, "dumps", lambda value: dumps(value if isinstance(value, dict) else [[1, 2]]))
    written(where, requests_of(np.random.default_rng(7)), [])
    with pytest.raises(LogDamaged, match=r"w\.wal is sound but of no shape"):
        read_log(where.path)


def test_zeros_are_a_log_of_which_nothing_reached_the_disk(tmp_path: Path) -> None:
    where = key(tmp_path)
    Path(where.path).write_bytes(bytes(50))
    assert read_log(where.path) is None and read_batch(where) is None
    assert written(where, [], []) and assert_empty(read_batch(where))


def test_logs_of_others_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    where = key(tmp_path)
    assert read_batch(where) is None  # nothing there
    written(where, requests_of(rng), steps_of(rng))
    assert read_batch(dataclasses.replace(where, batch=4)) is None  # the batch before: its results were delivered
    for change in ({"run": "another"}, {"worker": "rollout worker 1"}, {"batch": 2}):
        wanted = dataclasses.replace(where, **change)
        with pytest.raises(LogDamaged, match=r"batch 3 of 'rollout worker 0' in run 'run', not of batch") as caught:
            read_batch(wanted)
        assert wanted.run in str(caught.value) and wanted.worker in str(caught.value)
    for text in (b"{}", b"OPDWAL2\n and more", b"\0" * 50 + b"1"):
        Path(where.path).write_bytes(text)
        with pytest.raises(LogDamaged, match="is not a write-ahead log of this program's"):
            read_batch(where)
        with pytest.raises(LogDamaged, match="in the way: .*; it is left alone, move it away"):
            written(where, [], [])
        assert Path(where.path).read_bytes() == text


def test_resumed_requests_carry_what_the_log_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    requests, steps = requests_of(rng), steps_of(rng)
    where = key(tmp_path)
    written(where, requests, steps[:1])
    found = read_batch(where)
    assert found is not None
    stranger = Request(trajectory_id="new", prompt_id="n", domain="d", token_ids=(9,))
    fresh = [dataclasses.replace(r, sampled=NO_SAMPLES, version_spans=()) for r in requests]
    resumed = found.resumed([stranger, *fresh[::-1]], SAMPLING, 9)
    assert [request.trajectory_id for request in resumed] == ["new", "b\u00e9\n#0@t", "a#1@t", "a#0@t"]
    assert [len(request.sampled) for request in resumed] == [0, 1, 3, 1]
    old, new = VersionSpan(start=3, policy_version=1), VersionSpan(start=5, policy_version=2)
    assert resumed[2].version_spans == (old, new)
    assert resumed[3].version_spans == (VersionSpan(start=3, policy_version=2),)
    # Written anew and read again, they are what they were: resuming twice is resuming once.
    written(where, resumed, [])
    again = read_batch(where)
    assert again is not None
    assert [len(samples) for samples in again.sampled] == [0, 1, 3, 1]
    for one, two in zip(resumed, again.resumed([stranger, *fresh[::-1]], SAMPLING, 9), strict=True):
        assert one == two and one.version_spans == two.version_spans
        assert one.sampled.token_ids.tolist() == two.sampled.token_ids.tolist()
        assert one.sampled.logprobs.tolist() == two.sampled.logprobs.tolist()
    with pytest.raises(LogDamaged, match="a#0@t was logged with another prompt"):
        found.resumed([dataclasses.replace(fresh[0], token_ids=(5, 6))], SAMPLING, 9)
    for sampling, seed in ((SAMPLING, 8), (dataclasses.replace(SAMPLING, top_k=3), 9)):
        with pytest.raises(LogDamaged, match=r"batch 3 of 'rollout worker 0' was logged with \(sampling, seed\) ="):
            found.resumed(fresh, sampling, seed)


@pytest.mark.parametrize("room", [0, 5, 40, 60])
def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, room: int) -> None:
    rng = np.random.default_rng(6)
    requests, steps = requests_of(rng), steps_of(rng)
    where = key(tmp_path)
    with Log(where, requests, SAMPLING, policy_version=2, seed=9, durability="process") as log:
        log.append(*steps[0])
        size = os.path.getsize(where.path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, before[1]))  # the system then takes `room` bytes more
        try:
            with pytest.raises(RuntimeError, match=rf"w.wal cannot grow beyond {size} bytes: .*holds the 5 tokens"):
                log.append(*steps[1])
            with pytest.raises(RuntimeError, match="make room on that disk"):
                written(dataclasses.replace(where, batch=4), requests * 9, [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.path.getsize(where.path) == size
    assert_holds(read_batch(where), requests, steps[:1])
    assert os.listdir(tmp_path) == ["w.wal"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = dataclasses.replace(key(tmp_path), path=str(tmp_path / "file" / "wal" / "w.wal"))
    with pytest.raises(RuntimeError, match=r"file/wal/w\.wal cannot be written: .*rollout\.wal=none"):
        written(where, [], [])


def test_by_owner_is_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(7)
    for truncated in (False, True):
        samples = drawn(rng, 60, truncated)
        owners = rng.integers(0, 7, 60)
        owners[owners == 3] = 4  # one has nothing
        split = by_owner(owners, samples, 8)
        kept = np.split(samples.kept_ids, samples.kept_counts.cumsum()[:-1])
        for owner, own in enumerate(split):
            rows = [row for row in range(60) if owners[row] == owner]
            assert own.token_ids.tolist() == samples.token_ids[rows].tolist()
            assert own.logprobs.tolist() == samples.logprobs[rows].tolist()
            assert own.untruncated_logprobs.tolist() == samples.untruncated_logprobs[rows].tolist()
            assert own.kept_counts.tolist() == samples.kept_counts[rows].tolist()
            assert own.kept_ids.tolist() == [token for row in rows for token in kept[row].tolist()]
        assert len(split) == 8 and len(split[3]) == len(split[7]) == 0
        assert len(concatenate(split)) == 60
