"""What training a model costs in memory, per rank and per optimizer, from its architecture alone.

``python -m optimizer plan llama-3-8b --world 8 --fsdp`` from a shell; from code:

from optimizer.tools.plan import Setup, load_target, make_plan, parameters_of
plan = make_plan(parameters_of(load_target("llama-3-8b").model), Setup(world=8, sharding="fsdp"))
"""

from .memory import DEFAULT_RULES, Plan, Row, make_plan
from .model import Target, load_target, parameters_of, shipped
from .sharding import Parameter, Setup
from .states import State

__all__ = [
    "DEFAULT_RULES", "Parameter", "Plan", "Row", "Setup", "State", "Target",
    "load_target", "make_plan", "parameters_of", "shipped",
]  # fmt: skip
