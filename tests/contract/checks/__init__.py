"""The clauses of the contract, by subject matter; importing this package enters them all."""

from . import construction, gradients, groups, hooks, hyper, schedulers, state

__all__ = ["construction", "gradients", "groups", "hooks", "hyper", "schedulers", "state"]
