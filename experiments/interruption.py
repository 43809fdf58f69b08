"""Handle SIGTERM and SIGINT so that a run finishes its current step and saves a checkpoint before it exits."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger("experiments")


class Interruption:
    """A context in which SIGTERM and SIGINT are recorded and do not end the process.

    Schedulers and terminals often send a signal to a whole process group, and torchrun forwards it again. A second
    signal therefore has no effect; use SIGKILL to end the process at once. Python allows signal handlers only in the
    main thread, so in another thread this context does nothing.

    Attributes:
        signal: number of the first signal received, 0 for none.
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
    """Return the exit code of a process that a signal stopped after it saved its work.

    It is 128 plus the signal's number, as in shells. Under torchrun it is 0, because torchrun treats every other code
    as a failure and starts the run again.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + int(number)
