"""Runs a script with Accelerate's FSDP on processors: ``python -m tests.interop.fsdp_on_cpu SCRIPT arguments``.

Accelerate 1.15 chooses FSDP in ``AcceleratorState.__init__``, for distributed types that have an accelerator and not
for ``MULTI_CPU``. Here that choice is made for processors, too, by the same assignments; everything that follows from
it (wrapping, swapping parameters in the optimizer, clipping, checkpoints) is Accelerate's own code on gloo.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def choose_fsdp() -> None:
    """Let a state that was given an FSDP plugin use it, whatever the device."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            self.device = torch.device("cpu")  # "cpu:0", which Accelerate says, is another device to FSDP1
            PartialState._shared_state.update(distributed_type=self.distributed_type, device=self.device)

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    choose_fsdp()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
