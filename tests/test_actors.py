"""Actors of this process and of Ray's behave alike; a cluster is shared, private to the machine, found or refused."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

from opd.actors import ActorDied, LocalActor, Runtime, open_runtime
from opd.config import ConfigError, RuntimeConfig
from opd.types import Actor, Store, VersionSpan

ON_RAY = pytest.param("ray", marks=pytest.mark.ray)
BOTH = pytest.mark.parametrize("runtime", ["local", ON_RAY], indirect=True)
RAY = pytest.mark.parametrize("runtime", [ON_RAY], indirect=True)
WAIT = 60.0  # seconds; for what is not a test of time


alive: weakref.WeakSet[Counter] = weakref.WeakSet()  # of this process


class Counter:
    """Has a state, a name for its process, and ways to fail."""

    def __init__(self, store: Store, start: int = 0, *, step: int = 1) -> None:
        if start < 0:
            raise ConfigError(f"start={start} is too small; it must be at least 0")
        self.store, self.value, self.step = store, start, step
        self.threads = torch.get_num_threads()
        alive.add(self)

    def add(self, times: int = 1, *, extra: int = 0) -> int:
        self.value += times * self.step + extra
        return self.value

    def describe(self) -> tuple[int, int]:
        return os.getpid(), self.threads

    def num_alive(self) -> int:
        return len(alive)

    def echo(self, value: Any) -> Any:
        return value

    def put(self, value: Any) -> Any:
        return self.store.put(value)

    def total(self, handle: Any) -> float:
        return float(self.store.get(handle).sum())

    def fail(self, kind: type[Exception], *arguments: str) -> None:
        raise kind(*arguments)

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    def die(self) -> None:
        os._exit(3)


class Spelling(ValueError):
    """An exception of a test's own, with more than a message."""

    def __init__(self, message: str, letter: str) -> None:
        super().__init__(message, letter)
        self.letter = letter


class Closing:
    closed = 0

    def close(self) -> None:
        Closing.closed += 1


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    if request.param == "ray":
        yield request.getfixturevalue("ray_cluster")
    else:
        with open_runtime(RuntimeConfig(kind="local")) as local:
            yield local


@pytest.fixture(scope="module")
def counter(runtime: Runtime) -> Iterator[Actor]:
    """One actor that the tests of a runtime share."""
    actor = runtime.spawn(Counter, runtime.store, 5, step=2, name="counter 7")
    yield actor
    runtime.dismiss([actor])


@BOTH
def test_calls_are_made_in_order_and_keep_state(counter: Actor) -> None:
    start = counter.submit("add", 0).result(WAIT)
    futures = [counter.submit("add", times) for times in (1, 10, 100)]
    futures.append(counter.submit("add", extra=3))
    assert [future.result(WAIT) - start for future in futures] == [2, 22, 222, 227]
    assert futures[1].result(WAIT) - start == futures[1].result() - start == 22  # a result may be asked for again
    span = VersionSpan(start=3, policy_version=2)
    assert counter.submit("echo", {"span": span, "none": None}).result(WAIT) == {"span": span, "none": None}
    assert counter.name == "counter 7"


@BOTH
def test_exceptions_come_out_of_result_as_what_they_were(counter: Actor) -> None:
    for kind, message in ((ConfigError, "learner.num_ranks=3 is odd"), (ValueError, "x"), (TimeoutError, "of its own")):
        future = counter.submit("fail", kind, message)  # raises nothing here
        with pytest.raises(kind) as caught:
            future.result(WAIT)
        assert type(caught.value) is kind and str(caught.value) == message
        with pytest.raises(kind):
            future.result(WAIT)
    with pytest.raises(Spelling) as misspelt:
        counter.submit("fail", Spelling, "unknown letter", "q").result(WAIT)
    assert misspelt.value.letter == "q" and misspelt.value.args == ("unknown letter", "q")
    with pytest.raises(ActorDied, match="^teacher host 1 died, before or during score: gone$") as death:
        counter.submit("fail", ActorDied, "teacher host 1", "before or during score: gone").result(WAIT)
    assert death.value.name == "teacher host 1"  # not the one that was asked, which lives
    with pytest.raises(AttributeError, match="'Counter' object has no attribute 'substract'"):
        counter.submit("substract", 3).result(WAIT)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'kind'"):
        counter.submit("fail").result(WAIT)
    assert counter.submit("echo", "still here").result(WAIT) == "still here"


@BOTH
def test_a_constructor_fails_at_the_first_result(runtime: Runtime) -> None:
    actor = runtime.spawn(Counter, runtime.store, -3, name="spare")
    futures = [actor.submit("add"), actor.submit("describe")]
    for future in futures:
        with pytest.raises(ConfigError) as caught:
            future.result(WAIT)
        assert type(caught.value) is ConfigError and str(caught.value) == "start=-3 is too small; it must be at least 0"
    runtime.dismiss([actor])


@BOTH
def test_stored_values_pass_between_actors_until_they_are_dismissed(runtime: Runtime, counter: Actor) -> None:
    other = runtime.spawn(Counter, runtime.store, name="spare")
    values = torch.arange(5000, dtype=torch.float32)
    by_driver = runtime.store.put(values)
    by_actor = counter.submit("put", values * 2).result(WAIT)
    assert other.submit("total", by_driver).result(WAIT) == values.sum().item()
    assert other.submit("total", by_actor).result(WAIT) == 2 * values.sum().item()
    assert torch.equal(runtime.store.get(by_actor), values * 2)
    # A handle inside a record is passed on as a handle, not replaced by its value.
    returned = other.submit("echo", {"weights": [by_actor]}).result(WAIT)
    assert counter.submit("total", returned["weights"][0]).result(WAIT) == 2 * values.sum().item()
    runtime.dismiss([other])
    with pytest.raises(RuntimeError, match="spare was dismissed"):
        other.submit("add").result(WAIT)
    runtime.dismiss([other])  # once more is no error
    assert torch.equal(runtime.store.get(by_actor), values * 2)  # the one that put it is still there


def test_a_local_dismissal_closes_and_lets_go() -> None:
    with open_runtime(RuntimeConfig(kind="local")) as runtime:
        actor = runtime.spawn(Closing, name="c")
        assert isinstance(actor, LocalActor)
        held = weakref.ref(actor.instance)
        before = Closing.closed
        runtime.dismiss([actor])
        runtime.dismiss([actor])
        gc.collect()
        assert Closing.closed == before + 1 and held() is None


def test_local_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    with open_runtime(RuntimeConfig(kind="local", actor_threads=before + 1)) as runtime:
        actor = runtime.spawn(Counter, runtime.store, name="c")
        assert actor.submit("describe").result() == (os.getpid(), before + 1)
        host, port = runtime.free_port()
        assert host == "127.0.0.1" and 1024 <= port < 65536
    assert torch.get_num_threads() == before


# ---- what only Ray has -----------------------------------------------------------------------------------------------


@RAY
def test_actors_have_processes_and_threads_of_their_own(runtime: Runtime, counter: Actor) -> None:
    actors = [counter, runtime.spawn(Counter, runtime.store, name="spare")]
    (first, first_threads), (second, second_threads) = (actor.submit("describe").result(WAIT) for actor in actors)
    assert len({first, second, os.getpid()}) == 3 and first_threads == second_threads == 1
    started = time.monotonic()
    sleeping = [actor.submit("sleep", 1.0) for actor in actors]  # submit does not wait, and they sleep together
    assert time.monotonic() - started < 0.8
    assert [future.result(WAIT) for future in sleeping] == ["awake", "awake"]
    runtime.dismiss(actors[1:])


@RAY
def test_a_process_serves_the_next_actor_of_its_name(runtime: Runtime) -> None:
    actor = runtime.spawn(Counter, runtime.store, 5, name="spare")
    pid, _ = actor.submit("describe").result(WAIT)
    assert actor.submit("add").result(WAIT) == 6
    unfinished = actor.submit("add")
    runtime.dismiss([actor])
    heir = runtime.spawn(Counter, runtime.store, 1, name="spare")
    assert heir.submit("describe").result(WAIT)[0] == pid and unfinished.result(WAIT) == 7
    assert heir.submit("add").result(WAIT) == 2 and heir.submit("num_alive").result(WAIT) == 1
    with pytest.raises(RuntimeError, match="spare was dismissed"):
        actor.submit("add").result(WAIT)
    twin = runtime.spawn(Counter, runtime.store, name="spare")  # the process is taken: it gets another
    assert twin.submit("describe").result(WAIT)[0] != pid
    twin.submit("die")
    runtime.dismiss([heir, twin])
    after = runtime.spawn(Counter, runtime.store, name="spare")  # a dead process serves nobody
    assert after.submit("describe").result(WAIT)[0] == pid
    runtime.dismiss([after])


@RAY
def test_late_and_dead_actors_are_named(runtime: Runtime) -> None:
    actor = runtime.spawn(Counter, runtime.store, name="spare")
    handle = actor.submit("put", torch.ones(3)).result(WAIT)
    late = actor.submit("sleep", 1.5)
    with pytest.raises(TimeoutError, match=r"spare\.sleep did not answer within 0.2 s"):
        late.result(0.2)
    assert late.result(WAIT) == "awake"  # late, but not lost
    dying, waiting = actor.submit("die"), actor.submit("add")
    for future, method in ((dying, "die"), (waiting, "add"), (actor.submit("add"), "add")):
        with pytest.raises(ActorDied, match=f"^spare died, before or during {method}: ") as death:
            future.result(WAIT)
        assert death.value.name == "spare"

    def gone() -> bool:
        try:
            return runtime.store.get(handle) is None
        except RuntimeError as error:
            return str(error).startswith("a stored value is gone: ")

    until(gone)  # with the process that put it


@RAY
def test_nested_runtimes_share_the_cluster_and_clear_up_after_themselves(runtime: Runtime) -> None:
    value = runtime.store.put(torch.ones(3))
    with open_runtime(RuntimeConfig(kind="ray", actor_threads=3)) as inner:
        kept, dismissed = (inner.spawn(Counter, inner.store, name=f"inner {i}") for i in range(2))
        assert kept.submit("total", value).result(WAIT) == 3.0
        (pid, threads), (idle, _) = (actor.submit("describe").result(WAIT) for actor in (kept, dismissed))
        assert threads == 3
        inner.dismiss([dismissed])
        assert psutil.pid_exists(idle)
    until(lambda: not psutil.pid_exists(idle))
    assert kept.submit("add").result(WAIT) == 1  # the end of the inner one ended no actor, and no cluster
    runtime.dismiss([kept])
    with open_runtime(RuntimeConfig(kind="ray", cpus_per_actor=0.5)) as inner:
        greedy = inner.spawn(Counter, inner.store, name="greedy")
        pid, _ = greedy.submit("describe").result(WAIT)
        inner.dismiss([greedy])
        until(lambda: not psutil.pid_exists(pid))  # what it reserved is free for others


@RAY
def test_a_cluster_started_here_listens_on_loopback_only(runtime: Runtime) -> None:
    host, port = runtime.free_port()
    assert host == "127.0.0.1" and 1024 <= port < 65536
    # Ray's servers are children of this process, its workers children of theirs; other clusters are none of ours.
    processes = psutil.Process().children(recursive=True)
    listening = [
        (process.name(), connection.laddr.ip)
        for process in processes
        for connection in _connections(process)
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5
    assert {re.sub(r"^::ffff:", "", ip) for _, ip in listening} <= {"127.0.0.1", "::1"}, listening


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections("inet")
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"runtime.address=127.0.0.1:1 .*no Ray cluster answers there"),
        ("ray://127.0.0.1:1", r"runtime.address=ray://127.0.0.1:1 .*no Ray cluster answers there"),
        ("127.0.0.1:70000", "no Ray cluster answers there"),
        ("nonsense", "runtime.address='nonsense' .*is not host:port, ray://host:port or auto"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RuntimeConfig(kind="ray", address=address)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message), open_runtime(config):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message), open_runtime(dataclasses.replace(config, address=None)):
        pass
    assert time.monotonic() - started < 20
