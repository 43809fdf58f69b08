"""The clauses of the contract, by subject matter; importing this package enters them all."""

from . import (
    compiled,
    construction,
    distributed,
    flags,
    gradients,
    groups,
    hooks,
    hyper,
    schedulers,
    state,
    strides,
    training,
)

__all__ = [
    "compiled", "construction", "distributed", "flags", "gradients", "groups", "hooks", "hyper", "schedulers", "state",
    "strides", "training",
]  # fmt: skip
