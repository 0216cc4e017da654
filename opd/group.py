"""The process group of the learner's ranks: how they meet, and how they fail together.

A rank that fails leaves the cause in the group's key-value store and then leaves the group; the others raise that
cause, not "connection closed". So whoever asked them sees the first true cause whichever rank it looks at first.

Consumes: an address at which rank 0 listens. Produces: torch.distributed's default group, one per process. Waits: in
`join` and `exchange`, for all ranks. Unblocked by: a rank's failure, which `exchange` looks for. One that comes later,
inside a step, frees the others when whoever called it ends its process (gloo closes its sockets then; for NCCL, whose
waiting kernels notice nothing, a thread of each rank watches the store and aborts the group). Left out: restarting
ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed import distributed_c10d as c10d

from opd.config import ConfigError

LOOPBACK = "127.0.0.1"
FAILURE = "learner/failure"  # key of the first cause in the store
WATCH_SECONDS, POLL_SECONDS = 1.0, 0.002
JOIN_TIMEOUT = datetime.timedelta(minutes=10)


class Host:
    """Rank 0's store, bound before anyone is told where it is. `toward` is an address that other ranks can reach, by
    which the interface is chosen: the loopback one for a run within one machine."""

    def __init__(self, toward: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((toward, 9))  # sends nothing: a datagram socket only picks its own address
            self.address: str = probe.getsockname()[0]
        listener = socket.socket()
        listener.bind((self.address, 0))
        self.port: int = listener.getsockname()[1]
        self.store = TCPStore(
            self.address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def join(rank: int, world_size: int, backend: str, address: str, port: int, host: Host | None = None) -> None:
    """Makes this process rank `rank` of the group, or checks that it already is: a process keeps its group.

    `address` and `port` are unused with one rank. Rank 0 listens there unless `host` already does. Raises ValueError
    for a process that is another rank.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise ValueError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()}; it cannot also be rank {rank} of "
                f"{world_size}"
            )
        return
    store: Store
    if world_size == 1:  # opens no port
        store = HashStore()
    elif host is not None:
        store = host.store
    else:
        store = TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=JOIN_TIMEOUT)
    if address == LOOPBACK and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # by default gloo takes the interface of the host's name
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if backend == "nccl" and world_size > 1:
        threading.Thread(target=_watch, args=(store,), name="learner group watch", daemon=True).start()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What all ranks do inside, they do or fail together: an exception of one rank ends the group for all, and comes
    out of the others as ConfigError, ValueError or RuntimeError with the first rank's name and message. A group of one
    rank stays, and its exceptions are its own."""
    try:
        yield
    except Exception as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        cause = _first_cause(error)
        _leave()
        if cause is None:
            raise
        raise cause from error


def exchange(said: str) -> list[str]:
    """What every rank says at this point, by rank. All call it, equally often.

    Goes through the store, not a collective, so that a rank which fails before it gets here is noticed at once: raises
    RuntimeError then.
    """
    store, rank = _store(), dist.get_rank()
    call = store.add(f"learner/calls/{rank}", 1)  # of this group: its ranks agree, whatever a process did before
    keys = [f"learner/said/{call}/{other}" for other in range(dist.get_world_size())]
    store.set(keys[rank], said)
    while not store.check(keys):
        if store.check([FAILURE]):
            raise RuntimeError("another learner rank has failed")
        time.sleep(POLL_SECONDS)
    answers = [store.get(key).decode() for key in keys]
    store.delete_key(f"learner/said/{call - 1}/{rank}")  # which all have read who are here
    return answers


def _first_cause(error: Exception) -> Exception | None:
    """Another rank's failure as an exception to raise; None if `error`, which is recorded, came first."""
    rank = dist.get_rank()
    own = json.dumps({"rank": rank, "type": type(error).__name__, "message": str(error)})
    try:
        first = json.loads(_store().compare_set(FAILURE, "", own))
    except RuntimeError:  # the store went with rank 0
        return RuntimeError(f"learner rank 0 ended without a word; rank {rank} saw: {error}")
    if first["rank"] == rank:
        return None
    who, kinds = f"learner rank {first['rank']}", {"ConfigError": ConfigError, "ValueError": ValueError}
    if first["type"] in kinds:
        return kinds[first["type"]](f"{who}: {first['message']}")
    return RuntimeError(f"{who}: {first['type']}: {first['message']}")


def _store() -> Store:
    return c10d._get_default_store()


def _leave() -> None:
    # Not destroy_process_group: that waits for others to let go of the group, and DeepSpeed does not.
    c10d._abort_process_group()


def _watch(store: Store) -> None:
    """Aborts the group once a rank has failed, which ends the collectives that wait for it."""
    stop = threading.Event()
    while not stop.wait(WATCH_SECONDS):
        try:
            failed = store.check([FAILURE])
        except RuntimeError:  # the store went with rank 0
            failed = True
        if failed and dist.is_initialized():
            c10d._abort_process_group()
        if failed:
            return
