"""LoRA factors (arXiv 2106.09685): W + B A, with A (rank, in) and B (out, rank).

Policy: one scalar per output unit of each factor. Row o of B acts on output unit o of the base layer alone, as row o
of W does, so B takes the rows of W; a row of A is one rank direction, whose scale B is free to absorb, and directions
differ in use and so in scale. Heads shared in B would save little (B has one scalar per row of rank elements) and would
put rows in one block whose common part, the base weight, is frozen.
"""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import rows, vector
from .table import Context, Family, Maker


def _embedding_a(context: Context, why: str) -> Anatomy:
    """(rank, vocabulary), looked up transposed: one unit per token."""
    return Anatomy(
        context.shape, (Part(Role.LORA_A, context.shape[1]),), f"{why}; columns are tokens", axis=1, in_axis=0
    )


def _adapters(suffixes: tuple[str, ...]) -> dict[str, Maker]:
    made: dict[str, Maker] = {}
    for name in suffixes:
        made |= {f"lora_A.{name}": rows(Role.LORA_A), f"lora_B.{name}": rows(Role.LORA_B)}
        made |= {f"lora_embedding_A.{name}": _embedding_a, f"lora_embedding_B.{name}": rows(Role.LORA_B)}
        made |= {f"lora_magnitude_vector.{name}": vector(Role.NORM)}
    return made


def adapter_family(names: tuple[str, ...]) -> Family:
    """The row for a PEFT layer whose adapters have these names."""
    return Family(why="LoRA: one scalar per output unit of each factor", params=_adapters(names))
