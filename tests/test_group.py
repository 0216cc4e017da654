"""How ranks meet and how they fail: in processes that know nothing but torch.distributed and the group."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd import guards
from opd.config import ConfigError
from opd.group import Host, failing_together, join
from opd.types import Demonstration
from tests.test_learner import make_groups, plan_of

PATIENCE = 60.0  # seconds; gloo's own is half an hour


def meet(rank: int, folder: Path) -> None:
    """Rank 0 says in a file where it listens."""
    told = folder / "address"
    if rank == 0:
        host = Host("127.0.0.1")
        assert host.address == "127.0.0.1" and host.port > 0
        told.with_suffix(".next").write_text(f"{host.address} {host.port}")
        told.with_suffix(".next").rename(told)
        join(rank, 2, "gloo", host.address, host.port, host)
    else:
        while not told.exists():
            time.sleep(0.02)
        address, port = told.read_text().split()
        join(rank, 2, "gloo", address, int(port))


def fail(rank: int, error: Exception | None) -> None:
    """Rank 1 raises, or leaves; rank 0 waits for it in a collective."""
    with failing_together():
        if rank == 1 and error is not None:
            raise error
        dist.all_reduce(torch.ones(100_000))


def other_plan(rank: int) -> None:
    groups = make_groups(3)
    plan = plan_of(groups, [[Demonstration()] * 2 for _ in groups], num_ranks=2)
    guards.check_same_plan(plan, 4)  # agreed
    with failing_together():
        guards.check_same_plan(dataclasses.replace(plan, num_rows=plan.num_rows + rank), 4)


def other_step(rank: int) -> None:
    groups = make_groups(3)
    plan = plan_of(groups, [[Demonstration()] * 2 for _ in groups], num_ranks=2)
    with failing_together():
        guards.check_same_plan(plan, 4 + rank)


def die(rank: int) -> None:
    with failing_together():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(100_000))


SCENES: list[tuple[Callable[..., None], tuple[Any, ...], str, str]] = [  # and what ranks 0 and 1 say
    (fail, (None,), "nothing | True", "nothing | True"),
    (fail, (ConfigError("no"),), "ConfigError: learner rank 1: no | False", "ConfigError: no | False"),
    (fail, (KeyError("x"),), "RuntimeError: learner rank 1: KeyError: 'x' | False", "KeyError: 'x' | False"),
    (other_plan, (), "different plans, or are at different steps (4 to 4)", "different plans"),
    (other_step, (), "(4 to 5)", "(4 to 5)"),
    (die, (), "RuntimeError: ", ""),
]


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for index, (scene, args, _, _) in enumerate(SCENES):
        if not dist.is_initialized():
            meet(rank, folder / str(index))
        started = time.monotonic()
        try:
            scene(rank, *args)
            said = "nothing"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        assert time.monotonic() - started < PATIENCE
        (folder / str(index) / f"rank_{rank}").write_text(f"{said} | {dist.is_initialized()}")
        while scene is not die and len(list((folder / str(index)).glob("rank_*"))) < 2:
            time.sleep(0.02)  # the store ends with rank 0, and the other one may not have read the cause yet


def test_ranks_raise_the_first_cause_and_nobody_waits(tmp_path: Path) -> None:
    for index in range(len(SCENES)):
        (tmp_path / str(index)).mkdir()
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=3 * PATIENCE)
        process.kill()  # no effect on one that has ended
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    for index, (_, _, zero, one) in enumerate(SCENES):
        assert zero in (tmp_path / str(index) / "rank_0").read_text()
        if one:
            assert one in (tmp_path / str(index) / "rank_1").read_text()


def test_a_group_of_one_keeps_its_errors_and_its_group() -> None:
    join(0, 1, "gloo", "", 0)
    with pytest.raises(KeyError), failing_together():
        raise KeyError("x")
    assert dist.is_initialized()
    with pytest.raises(ValueError, match="rank 0 of 1; it cannot also be rank 1 of 2"):
        join(1, 2, "gloo", "127.0.0.1", 1)
