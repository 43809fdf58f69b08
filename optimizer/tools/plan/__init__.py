"""Compute the memory of training a model, per rank and per optimizer, from its architecture alone.

From a shell: ``python -m optimizer plan llama-3-8b --world 8 --fsdp``. From code::

    from optimizer.tools.plan import Setup, make_plan, parameters_of
    from optimizer.tools.targets import load_target
    plan = make_plan(parameters_of(load_target("llama-3-8b")), Setup(world=8, sharding="fsdp"))
"""

from .memory import DEFAULT_RULES, Plan, Row, make_plan
from .model import parameters_of
from .sharding import Parameter, Setup
from .states import State

__all__ = [
    "DEFAULT_RULES",
    "Parameter",
    "Plan",
    "Row",
    "Setup",
    "State",
    "make_plan",
    "parameters_of",
]
