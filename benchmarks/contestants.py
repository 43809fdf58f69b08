"""The optimizers that the benchmark compares, including peers that are installed outside the import path."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.models import heads
from optimizer import AdamMini

BASELINE = "AdamW fused"
LR, DECAY = 1e-4, 0.1
Make = Callable[[nn.Module, str], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One optimizer in the benchmark.

    Attributes:
        make: (model, its name in ``models.MODELS``) -> optimizer.
        heat: contestants of one heat are timed together, with the baseline in every heat. Slow contestants have their
            own heat, so that the others can have more rounds.
        ours: whether the optimizer belongs to this project. An error of such an optimizer ends the benchmark; an error
            of another is recorded in its row.
    """

    make: Make
    heat: str
    ours: bool = False


def _torch(kind: type[torch.optim.Optimizer], **flags: bool) -> Make:
    return lambda model, _: kind(model.parameters(), lr=LR, weight_decay=DECAY, **flags)


def _mini(**options: object) -> Make:
    return lambda model, _: AdamMini(model, lr=LR, weight_decay=DECAY, **options)


def _torchao(name: str) -> Make:
    def make(model: nn.Module, _: str) -> torch.optim.Optimizer:
        logging.getLogger("torchao").setLevel(logging.ERROR)
        import torchao.optim

        return getattr(torchao.optim, name)(model.parameters(), lr=LR, weight_decay=DECAY)

    return make


def _published(model: nn.Module, name: str) -> torch.optim.Optimizer:
    kind = published().Adam_mini
    named = model.named_parameters()
    return kind(named_parameters=named, lr=LR, weight_decay=DECAY, verbose=False, **heads(name))


@cache
def published() -> ModuleType:
    """Import the published package, which is installed outside the import path because this project has its name, too.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    path = Path(sys.prefix) / "published" / "adam_mini" / "__init__.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `make setup` installs the published package there")
    spec = importlib.util.spec_from_file_location(
        "published_adam_mini", path, submodule_search_locations=[str(path.parent)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def add_peers(folder: Path) -> None:
    """Add the peers' folder to this process's import path; no other process of the project has it there.

    Raises:
        FileNotFoundError: the peers are not installed in the folder.
    """
    if not (folder / "torchao").is_dir():
        raise FileNotFoundError(f"{folder}/torchao is missing: `make bench` installs it there")
    sys.path.append(str(folder))


_FP32 = torch.float32
CONTESTANTS = {
    BASELINE: Contestant(_torch(torch.optim.AdamW, fused=True), "fused"),
    "AdamMini fused": Contestant(_mini(fused=True, exp_avg_dtype=_FP32), "fused", ours=True),
    "AdamMini fused, bf16 moment": Contestant(_mini(fused=True, exp_avg_dtype=torch.bfloat16), "fused", ours=True),
    "AdamMini fused, int8 moment": Contestant(_mini(fused=True, exp_avg_dtype="int8"), "fused", ours=True),
    "AdamMini fused, int4 moment": Contestant(_mini(fused=True, exp_avg_dtype="int4"), "fused", ours=True),
    "AdamMini fused, factored": Contestant(_mini(fused=True, rules="factored", exp_avg_dtype=_FP32), "fused", True),
    "AdamMini eager": Contestant(_mini(foreach=False, exp_avg_dtype=_FP32), "eager", ours=True),
    "AdamMini foreach": Contestant(_mini(foreach=True, exp_avg_dtype=_FP32), "eager", ours=True),
    "AdamW foreach": Contestant(_torch(torch.optim.AdamW, foreach=True), "slow"),
    "AdamW for-loop": Contestant(_torch(torch.optim.AdamW, foreach=False), "slow"),
    "Adafactor": Contestant(_torch(torch.optim.Adafactor), "slow"),
    "adam-mini 1.1.1": Contestant(_published, "slow"),
    "AdamW 8-bit (torchao)": Contestant(_torchao("AdamW8bit"), "compiled"),
    "AdamW 4-bit (torchao)": Contestant(_torchao("AdamW4bit"), "compiled"),
}
MAIN = (BASELINE, "AdamMini fused", "AdamMini fused, int8 moment", "AdamMini eager")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state, including the parts of tensor subclasses."""
    return sum(_bytes(value) for state in optimizer.state.values() for value in _tensors(state.values()))


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    return (value for value in values if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
