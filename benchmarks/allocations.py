"""What a training step allocates on a CPU, by kind, at the moment when it needs the most.

Every operation's outputs are followed until their storage is freed. Memory that an operation allocates and frees before
it returns is seen by torch's profiler alone, and memory that torch does not allocate (code, the heap's gaps) only in
the process's resident memory.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = (
    "parameters",
    "first moment",
    "second moment",
    "gradients",
    "bf16 copies of weights",
    "activations",
    "logits",
    "other",
)
FIRST, SECOND = ("exp_avg", "exp_avg_scale"), ("exp_avg_sq", "exp_avg_sq_col", "step")


def resident(entry: str = "VmRSS") -> int:
    """Return this process's resident memory in bytes, its peak (``VmHWM``), or its files' part (``RssFile``).

    Raises:
        RuntimeError: the system has no /proc.
    """
    path = Path("/proc/self/status")
    found = re.search(rf"{entry}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    if not found:
        raise RuntimeError(f"{path} has no {entry}; resident memory is measured on Linux")
    return 1024 * int(found[1])


@contextmanager
def peak_resident() -> Iterator[Callable[[], int]]:
    """Forget the peak of resident memory; yield a function that returns the peak since then."""
    Path("/proc/self/clear_refs").write_text("5")
    yield lambda: resident("VmHWM")


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of an optimizer's first and second moments; counters of steps count as second moments.

    Raises:
        RuntimeError: its state has an entry that is neither.
    """
    found = Counter({"first moment": 0, "second moment": 0})
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                found[_moment(name)] += value.nbytes
    return dict(found)


def _moment(name: str) -> str:
    if name in FIRST:
        return "first moment"
    if name in SECOND:
        return "second moment"
    raise RuntimeError(f"the optimizer's state has {name!r}, which is neither of {FIRST} nor of {SECOND}")


class AllocationsByKind(TorchDispatchMode):
    """Follow all storages that live during a step, in a ``with`` statement around it.

    Args:
        model: the model.
        optimizer: its optimizer, which has its state already.
        tokens: tokens of the batch. A tensor as large as the logits of all of them, or of all but the last of each row,
            in any precision, is logits, whatever it was computed for.
        vocabulary: number of tokens of the model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self._model, self._logits = model, tokens * vocabulary
        self._live: dict[int, int] = {}  # number of a storage -> bytes
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._kinds: dict[int, str] = {}
        self._saved: set[int] = set()
        self._total = self._next = 0
        self._phase, self._worst = "", (0, "", {})  # type: tuple[int, str, dict[int, int]]
        for parameter in model.parameters():
            self._kinds[self._follow(parameter)] = "parameters"
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    self._kinds[self._follow(value)] = _moment(name)
        self._outside = ExitStack()

    def __enter__(self) -> AllocationsByKind:
        for parameter in self._model.parameters():
            hook = parameter.register_post_accumulate_grad_hook(self._gradient)
            self._outside.callback(hook.remove)
        self._outside.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._outside.close()

    def begin(self, phase: str) -> None:
        """Name the phase that begins."""
        self._phase = phase

    def result(self) -> dict[str, Any]:
        """Return the phase of the peak, its bytes, and its bytes by kind."""
        total, phase, live = self._worst
        found = dict.fromkeys(KINDS, 0)
        for number, size in live.items():
            found[self._kind(number, size)] += size
        return {"phase": phase, "followed": total, "kinds": found}

    def _kind(self, number: int, size: int) -> str:
        if number in self._kinds:
            return self._kinds[number]
        if 0.9 * self._logits <= size / 2 <= self._logits or 0.9 * self._logits <= size / 4 <= self._logits:
            return "logits"
        return "activations" if number in self._saved else "other"

    def _follow(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage, which is new or known."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage)
        if number is None:
            number = self._numbers[storage] = self._next
            self._next += 1
            self._live[number] = storage.nbytes()
            self._total += storage.nbytes()
            weakref.finalize(storage, self._free, number)
        return number

    def _free(self, number: int) -> None:
        self._total -= self._live.pop(number, 0)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._saved.add(self._follow(tensor))
        return tensor

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._kinds[self._follow(parameter.grad)] = "gradients"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                number = self._follow(tensor)
                if func is torch.ops.aten._to_copy.default and self._kinds.get(self._follow(args[0])) == "parameters":
                    self._kinds.setdefault(number, "bf16 copies of weights")
        if self._total > self._worst[0]:
            self._worst = self._total, self._phase, dict(self._live)
        return out
