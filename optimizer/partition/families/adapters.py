"""LoRA factors (arXiv 2106.09685): W + B A, with A (rank, in) and B (out, rank).

Each factor has one scalar per output unit. Row o of B affects only output unit o of the base layer, as row o of W
does, so the units of B are its rows. A row of A is one direction of the low-rank space; B can absorb its scale, and
directions are used differently, so their gradients differ in scale. Sharing a scalar per head in B would save little,
because B has one scalar per row of ``rank`` elements. It would also combine rows whose common part, the base weight,
is frozen.
"""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import rows, vector
from .table import Context, Family, Maker


def _embedding_a(context: Context, why: str) -> Anatomy:
    """Describe the A factor of an embedding, (rank, vocabulary): it is used transposed, with one unit per token."""
    return Anatomy(
        context.shape, (Part(Role.LORA_A, context.shape[1]),), f"{why}; columns are tokens", axis=1, in_axis=0
    )


def _params(adapters: tuple[str, ...]) -> dict[str, Maker]:
    """Return parameter path -> maker for the adapters with these names."""
    params: dict[str, Maker] = {}
    for name in adapters:
        params |= {f"lora_A.{name}": rows(Role.LORA_A), f"lora_B.{name}": rows(Role.LORA_B)}
        params |= {f"lora_embedding_A.{name}": _embedding_a, f"lora_embedding_B.{name}": rows(Role.LORA_B)}
        params |= {f"lora_magnitude_vector.{name}": vector(Role.NORM)}
    return params


def adapter_family(names: tuple[str, ...]) -> Family:
    """Return the family for a PEFT layer whose adapters have these names."""
    return Family(why="LoRA: one scalar per output unit of each factor", params=_params(names))
