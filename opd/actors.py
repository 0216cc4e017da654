"""Where the objects of a run live: in this process, or as Ray actors. The only file that imports ray.

Workers, teachers and learner ranks are plain classes. `open_runtime` gives a `Runtime` whose `spawn` puts one of them
somewhere and whose `store` holds large values: `LocalRuntime` here, at once, one call after another; `RayRuntime` in
processes of their own, with a shared object store, in parallel. Both sides see the same methods, so that a run is the
same run to rounding, and the same errors: what a method or a constructor raised comes out of `result`, as the exception
it was; an actor whose process ended on its own is `ActorDied`, one that was dismissed a RuntimeError that names it.

An actor makes its calls one by one, in the order in which they were submitted. Nobody waits but in `result`, `get` and
`open_runtime`. Left out: restarting actors (`rollout.fleet` replaces the dead among its workers).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd.config import ConfigError, RuntimeConfig
from opd.types import Actor, Future, Store

LOOPBACK = "127.0.0.1"
CLEAR_SECONDS = 10.0  # for a dismissed actor to finish what it was doing, before its process is given up
CONNECT_SECONDS = 5.0  # to find out that nobody listens at an address, for which Ray itself takes minutes


class ActorDied(RuntimeError):
    """An actor ended without being asked to, and its state with it. `name` is the actor's."""

    def __init__(self, name: str, circumstances: str) -> None:
        super().__init__(name, circumstances)  # the arguments that an exception is rebuilt from in another process
        self.name = name

    def __str__(self) -> str:
        return f"{self.args[0]} died, {self.args[1]}"


@dataclass(slots=True, frozen=True)
class _Returned:
    value: Any

    def result(self, timeout_seconds: float | None = None) -> Any:
        return self.value


@dataclass(slots=True, frozen=True)
class _Raised:
    error: Exception

    def result(self, timeout_seconds: float | None = None) -> Any:
        raise self.error


class LocalStore:
    """Values are their own handles."""

    def put(self, value: Any) -> Any:
        return value

    def get(self, handle: Any) -> Any:
        return handle


class LocalActor:
    """`cls(*args, **kwargs)` in this process, built at once."""

    def __init__(self, name: str, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = name
        self.instance: Any = None
        self.failure: Exception | None = None  # why there is no instance
        try:
            self.instance = cls(*args, **kwargs)
        except Exception as error:
            self.failure = error

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future:
        """Makes the call now; `result` gives its value or raises its exception."""
        if self.failure is not None:
            return _Raised(self.failure)
        try:
            return _Returned(getattr(self.instance, method)(*args, **kwargs))
        except Exception as error:
            return _Raised(error)

    def dismiss(self) -> None:
        close = getattr(self.instance, "close", None)
        self.instance, self.failure = None, self.failure or RuntimeError(f"{self.name} was dismissed")
        if close is not None:
            close()


class LocalRuntime:
    """Everything in this process: for debugging, and for one device with nothing else installed."""

    kind = "local"

    def __init__(self, config: RuntimeConfig) -> None:
        import torch

        self.store: Store = LocalStore()
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(config.actor_threads)

    def spawn(self, cls: type, *args: Any, name: str, num_gpus: float = 0.0, **kwargs: Any) -> Actor:
        """Constructs `cls(*args, **kwargs)` here; errors of the constructor come with the first result."""
        return LocalActor(name, cls, args, kwargs)

    def dismiss(self, actors: list[Actor]) -> None:
        """Ends actors and lets go of what they held, after their own `close()` if they have one."""
        for actor in actors:
            if isinstance(actor, LocalActor):
                actor.dismiss()

    def free_port(self) -> tuple[str, int]:
        """Address and port at which learner ranks meet."""
        return _free_port(LOOPBACK)

    def close(self) -> None:
        import torch

        torch.set_num_threads(self._previous_threads)


@dataclass(slots=True, frozen=True)
class _Handle:
    """An object reference inside a plain record, so that Ray does not replace it by its value when it is passed on."""

    ref: Any


class RayStore:
    """Ray's object store: one copy per node, read by every process on it. A value is there for as long as somebody
    holds its handle and the process that put it lives."""

    def put(self, value: Any) -> Any:
        import ray

        return _Handle(ray.put(value))

    def get(self, handle: Any) -> Any:
        """Raises RuntimeError for a value whose owner has ended."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(handle.ref)
        except RayError as error:
            raise RuntimeError(f"a stored value is gone: {_one_line(error)}") from error


@dataclass(slots=True, frozen=True)
class _RayFuture:
    built: Any  # reference of the constructor's outcome, whose error comes first
    ref: Any
    actor: str
    method: str

    def result(self, timeout_seconds: float | None = None) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

        try:
            return ray.get([self.built, self.ref], timeout=timeout_seconds)[1]
        except GetTimeoutError as error:
            raise TimeoutError(f"{self.actor}.{self.method} did not answer within {timeout_seconds:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise RuntimeError(f"{self.actor}.{self.method} failed: {_one_line(error)}") from error
        except RayActorError as error:
            raise ActorDied(self.actor, f"before or during {self.method}: {_one_line(error)}") from error
        except RayError as error:
            raise RuntimeError(f"{self.actor}.{self.method} has no result: {_one_line(error)}") from error


@dataclass(slots=True)
class RayActor:
    """A plain object in a Ray process: `handle` is that of a `_Process`, `built` the outcome of its `build`."""

    name: str
    handle: Any
    built: Any
    reserves: bool  # GPUs or CPUs, which nobody else can have before the process ends
    dismissed: bool = False

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future:
        if self.dismissed:
            return _Raised(RuntimeError(f"{self.name} was dismissed"))
        return _RayFuture(self.built, self.handle.call.remote(method, *args, **kwargs), self.name, method)


class _Process:
    """What runs inside a Ray actor's process: one plain object after another."""

    instance: Any = None

    def build(self, cls: type, threads: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads)
        self.instance = cls(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.instance, method)(*args, **kwargs)

    def clear(self) -> None:
        import torch

        instance, self.instance = self.instance, None
        close = getattr(instance, "close", None)
        if close is not None:
            close()
        del instance, close
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class RayRuntime:
    """Ray actors on a cluster that is joined (`runtime.address`, or RAY_ADDRESS), or started here and stopped at the
    end.

    A cluster started here listens on the loopback interface only. Actors reserve GPUs as configured and
    `runtime.cpus_per_actor` CPUs, by default none: phases of a step take turns, so that a small machine may hold more
    actors than cores. The process of a dismissed actor that reserved nothing serves the next one of the same name,
    because a fresh one takes seconds to import what it needs.
    """

    kind = "ray"

    def __init__(self, config: RuntimeConfig) -> None:
        """Raises ConfigError when the cluster cannot be joined or started."""
        address = config.address or os.environ.get("RAY_ADDRESS") or None
        if address is not None:
            _check_address(address)
        # Not imported to find out: the environment decides at its import what Ray listens on.
        ray = sys.modules.get("ray")
        self._started_here = ray is None or not ray.is_initialized()
        if self._started_here:
            _start_ray(config, address)
        self.config = config
        self.store: Store = RayStore()
        self._idle: dict[str, list[tuple[Any, Any]]] = {}  # name -> processes, with the outcome of their `clear`

    def spawn(self, cls: type, *args: Any, name: str, num_gpus: float = 0.0, **kwargs: Any) -> Actor:
        """Builds `cls(*args, **kwargs)` in its own process; errors of the constructor come with the first result."""
        import ray

        reserves = bool(num_gpus or self.config.cpus_per_actor)
        process: Any = None if reserves else self._idle_process(name)
        if process is None:
            # No environment of its own: an actor that has one does not get one of the processes that Ray holds ready.
            process = ray.remote(_Process).options(num_cpus=self.config.cpus_per_actor, num_gpus=num_gpus).remote()
        return RayActor(name, process, process.build.remote(cls, self.config.actor_threads, args, kwargs), reserves)

    def _idle_process(self, name: str) -> Any:
        import ray
        from ray.exceptions import RayError

        while self._idle.get(name):
            process, cleared = self._idle[name].pop()
            try:
                ray.get(cleared, timeout=CLEAR_SECONDS)
            except RayError:  # dead, still busy, or in a state that its `close` did not expect
                ray.kill(process)
            else:
                return process
        return None

    def dismiss(self, actors: list[Actor]) -> None:
        """Ends actors, after their own `close()` if they have one; what they hold is freed."""
        import ray

        for actor in actors:
            if isinstance(actor, RayActor) and not actor.dismissed:
                actor.dismissed = True
                if actor.reserves:
                    ray.kill(actor.handle)
                else:
                    self._idle.setdefault(actor.name, []).append((actor.handle, actor.handle.clear.remote()))

    def free_port(self) -> tuple[str, int]:
        """Address and port at which learner ranks meet: this node's, on a cluster of several."""
        import ray

        return _free_port(ray.util.get_node_ip_address())

    def close(self) -> None:
        import ray

        for processes in self._idle.values():
            for process, _ in processes:
                ray.kill(process)
        if self._started_here:
            ray.shutdown()


Runtime = LocalRuntime | RayRuntime


@contextlib.contextmanager
def open_runtime(config: RuntimeConfig) -> Iterator[Runtime]:
    """The runtime of a command. Nested calls share one cluster: only the outermost starts and stops it."""
    runtime: Runtime = RayRuntime(config) if config.kind == "ray" else LocalRuntime(config)
    try:
        yield runtime
    finally:
        runtime.close()


def _start_ray(config: RuntimeConfig, address: str | None) -> None:
    # Ray's own defaults report usage and hide GPUs from actors that reserve none.
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        # The first is Ray's switch for clusters of one node: all its servers, here and in the processes that inherit
        # it, listen on the loopback interface alone. The argument `_node_ip_address` can not ask for that: Ray replaces
        # a loopback address by the host's own.
        environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": str(config.actor_threads)}
        # A driver that is killed takes the servers with it, and a process that was just being started looks for them a
        # minute by default. On one machine they do not come back.
        environment |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
        settings |= {"num_cpus": config.num_cpus, "include_dashboard": False}
        if config.object_store_gb is not None:
            settings["object_store_memory"] = int(config.object_store_gb * 1e9)
    with _environment(environment):
        import ray

        try:
            ray.init(address=address or "local", **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"runtime.address={address}" if address else "a new local cluster"
            raise ConfigError(f"Ray did not start ({where}): {error}. runtime=local runs without it") from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside, put back after."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_address(address: str) -> None:
    """Raises ConfigError for an address that is none, or at which nobody listens."""
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/:\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if match is None:
        raise ConfigError(f"runtime.address={address!r} (or RAY_ADDRESS) is not host:port, ray://host:port or auto")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"runtime.address={address} (or RAY_ADDRESS): no Ray cluster answers there ({error}); start one with "
            "`ray start --head`, or leave the address out to start one here"
        ) from error


def _one_line(error: Exception) -> str:
    """Ray's message without the list of what it might be, which is the same in every death's."""
    return " ".join(str(error).split()).partition(" Some common causes include")[0]


def _free_port(host: str) -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, probe.getsockname()[1]
