"""SIGTERM and SIGINT as a wish: the running step ends, the run is saved, then the process goes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger("experiments")


class Interruption:
    """While this is entered, SIGTERM and SIGINT are remembered instead of obeyed.

    Schedulers and terminals often send a signal to a whole process group and torchrun passes it on once more, so a
    second one changes nothing; SIGKILL is always there. Outside the main thread, where Python allows no handlers,
    nothing is caught.

    Attributes:
        signal: the first signal that came, 0 for none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number


def exit_code(number: int = signal.SIGTERM) -> int:
    """Of a process that was asked to stop and has saved its work: 128 + the signal's number, as shells have it.

    0 under torchrun, which takes anything else for a failure and would start the run again.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + int(number)
