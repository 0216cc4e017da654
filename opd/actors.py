"""Where the objects of a run live: in this process, or as Ray actors. The only file that imports ray.

Workers, teachers and learner ranks are plain classes. `open_runtime` gives a `Runtime` whose `spawn` puts one of them
somewhere and whose `store` holds large values: `LocalRuntime` here, at once, one call after another; `RayRuntime` in
processes of their own, with a shared object store, in parallel. Both sides see the same methods, so that a run is the
same run to rounding.

An actor's error comes back as the exception that was raised there, with its remote traceback as the cause.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd.config import ConfigError, RuntimeConfig
from opd.types import Actor, Future, Store

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Done:
    """A call that has already been made."""

    value: Any

    def result(self, timeout_seconds: float | None = None) -> Any:
        return self.value


class LocalStore:
    """Values are their own handles."""

    def put(self, value: Any) -> Any:
        return value

    def get(self, handle: Any) -> Any:
        return handle


@dataclass(slots=True)
class LocalActor:
    name: str
    instance: Any

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future:
        return _Done(getattr(self.instance, method)(*args, **kwargs))


class LocalRuntime:
    """Everything in this process: for debugging, and for one device with nothing else installed."""

    kind = "local"

    def __init__(self, config: RuntimeConfig) -> None:
        import torch

        self.store: Store = LocalStore()
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(config.actor_threads)

    def spawn(self, cls: type, *args: Any, name: str, num_gpus: float = 0.0, **kwargs: Any) -> Actor:
        """Constructs `cls(*args, **kwargs)` here."""
        return LocalActor(name, cls(*args, **kwargs))

    def dismiss(self, actors: list[Actor]) -> None:
        """Ends actors; their memory goes when the last reference does."""
        for actor in actors:
            close = getattr(actor.instance, "close", None) if isinstance(actor, LocalActor) else None
            if close is not None:
                close()

    def free_port(self) -> tuple[str, int]:
        return _free_port("127.0.0.1")

    def close(self) -> None:
        import torch

        torch.set_num_threads(self._previous_threads)


@dataclass(slots=True, frozen=True)
class _Handle:
    """An object reference inside a plain record, so that Ray does not replace it by its value when it is passed on."""

    ref: Any


class RayStore:
    """Ray's object store: one copy per node, read by every process on it."""

    def put(self, value: Any) -> Any:
        import ray

        return _Handle(ray.put(value))

    def get(self, handle: Any) -> Any:
        import ray

        return ray.get(handle.ref)


@dataclass(slots=True)
class _RayFuture:
    ref: Any
    actor: str
    method: str

    def result(self, timeout_seconds: float | None = None) -> Any:
        import ray

        try:
            return ray.get(self.ref, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"{self.actor}.{self.method} did not answer within {timeout_seconds:g} s") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Exception):
                raise cause from error
            raise
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(f"{self.actor} died during {self.method}: {error}") from error


@dataclass(slots=True)
class RayActor:
    name: str
    handle: Any

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future:
        return _RayFuture(self.handle.call.remote(method, *args, **kwargs), self.name, method)


class _Process:
    """What runs inside a Ray actor's process: the plain object, with its thread count set before it exists."""

    def __init__(self, cls: type, threads: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads)
        self.instance = cls(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.instance, method)(*args, **kwargs)


class RayRuntime:
    """Ray actors on a cluster that is joined (`runtime.address`, or RAY_ADDRESS) or started here and stopped at the end.

    Actors reserve GPUs as configured and `runtime.cpus_per_actor` CPUs, by default none: phases of a step take turns,
    so that a small machine may hold more actors than cores.
    """

    kind = "ray"

    def __init__(self, config: RuntimeConfig) -> None:
        import ray

        self.config = config
        self.store: Store = RayStore()
        self._started_here = not ray.is_initialized()
        if self._started_here:
            _start_ray(config)

    def spawn(self, cls: type, *args: Any, name: str, num_gpus: float = 0.0, **kwargs: Any) -> Actor:
        """Starts `cls(*args, **kwargs)` in a process of its own; errors of the constructor come with the first call."""
        import ray

        threads = str(self.config.actor_threads)
        remote = ray.remote(_Process).options(
            num_cpus=self.config.cpus_per_actor,
            num_gpus=num_gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        )
        return RayActor(name, remote.remote(cls, self.config.actor_threads, args, kwargs))

    def dismiss(self, actors: list[Actor]) -> None:
        """Kills actors at once."""
        import ray

        for actor in actors:
            if isinstance(actor, RayActor):
                ray.kill(actor.handle)

    def free_port(self) -> tuple[str, int]:
        """Address and port at which learner ranks meet: loopback on a cluster that was started here."""
        import ray

        return _free_port("127.0.0.1" if self._started_here else ray.util.get_node_ip_address())

    def close(self) -> None:
        import ray

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


def _start_ray(config: RuntimeConfig) -> None:
    # Ray's own defaults print a banner, report usage and hide GPUs from actors that reserve none.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS") or None
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        settings |= {"num_cpus": config.num_cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        if config.object_store_gb is not None:
            settings["object_store_memory"] = int(config.object_store_gb * 1e9)
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"runtime.address={address}" if address else "a new local cluster"
        raise ConfigError(f"Ray did not start ({where}): {error}. runtime=local runs without it") from error


def _free_port(host: str) -> tuple[str, int]:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, probe.getsockname()[1]
