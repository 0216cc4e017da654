"""How a run is asked to stop: SIGTERM and SIGINT.

The one idea: a signal means "stop where nothing is lost". Inside a stage's loop that is the end of the step, where the
stage saves and raises `Stopped`; anywhere else it is at once, since everything else of a run is done over when it goes
on. A second signal interrupts whatever runs, as Ctrl-C does, and a third has the effect it has on any program.

Left out: what a stage saves (`opd.train`) and what is said to the user (`opd.__main__`).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run stopped because it was asked to; it goes on with resume=auto."""


class Stop:
    """Whether a run has been asked to stop. One that `signals` never ran for is asked by nobody."""

    def __init__(self) -> None:
        self.asked = False
        self._waits = False  # for the end of a step

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Listens to SIGTERM and SIGINT inside; in a thread that is not the main one, which gets no signals, not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_step_ends(self) -> Iterator[None]:
        """Inside, the first signal sets `asked` and does nothing else: the loop looks at it. Raises Stopped at the end
        if nobody did."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.asked:
            raise Stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked:
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked = True
        if not self._waits:
            raise Stopped
        log.warning("%s: the run stops when this step is saved; a second one stops it at once", name)
