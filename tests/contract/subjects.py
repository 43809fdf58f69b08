"""The optimizers under contract, and what is true of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from adam_mini import Adam_mini
from benchmarks import contestants
from optimizer import AdamMini


@dataclass(frozen=True)
class Subject:
    """One optimizer class under fixed options.

    Attributes:
        name: what tests are called by.
        cls: the class.
        options: arguments every check gives it, unless the check gives its own.
        ours: whether the promises that this project makes beyond torch's apply to it.
        elementwise: whether its second moment is Adam's, one scalar per element.
        arguments: where the class takes fewer keyword arguments than torch's, options go into the group's dict.
    """

    name: str
    cls: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ours: bool = False
    elementwise: bool = False
    arguments: bool = True

    def make(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """Build it from ``params`` as a user would."""
        options = {**self.options, **options}
        if self.arguments:
            return self.cls(params, **options)
        known = inspect.signature(self.cls).parameters
        rest = {name: value for name, value in options.items() if name not in known}
        optimizer = self.cls(params, **{name: value for name, value in options.items() if name in known})
        for group in optimizer.param_groups:
            group.update(rest)
        return optimizer

    @property
    def engine(self) -> str:
        """The engine its options ask for: "fused", "foreach", "for-loop", or "any"."""
        for name in ("fused", "foreach"):
            if self.options.get(name):
                return name
        return "any" if self.options.get("fused") is None and self.options.get("foreach") is None else "for-loop"


def _engines(
    name: str, cls: Callable[..., torch.optim.Optimizer], facts: dict[str, Any], **fixed: Any
) -> list[Subject]:
    engines: dict[str, dict[str, Any]] = {
        "": {}, " for-loop": {"fused": False}, " foreach": {"foreach": True}, " fused": {"fused": True},
    }  # fmt: skip
    return [
        Subject(name + suffix, cls, MappingProxyType({**fixed, **options}), **facts)
        for suffix, options in engines.items()
    ]


# Without torch's own default decay of 0.01, which would blur what a step does.
TORCH = _engines("AdamW", torch.optim.AdamW, {"elementwise": True}, weight_decay=0.0)
OURS = [
    *_engines("AdamMini", AdamMini, {"ours": True}),
    *_engines("AdamMini elementwise", AdamMini, {"ours": True, "elementwise": True}, rules="elementwise"),
    *_engines("AdamMini factored", AdamMini, {"ours": True}, rules="factored"),
    Subject("Adam_mini", Adam_mini, ours=True, arguments=False),
]
SUBJECTS = {subject.name: subject for subject in (*TORCH, *OURS)}


def published() -> Subject:
    """The published package as a subject, quiet."""
    return Subject("published", contestants.published().Adam_mini, MappingProxyType({"verbose": False}))
