"""The partition as a table a person can check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .apply import layout_of
from .discover import discover
from .layout import Layout
from .roles import Anatomy
from .rules import Rules


@dataclass(frozen=True)
class Row:
    """One line of the table: a parameter under the rules."""

    name: str
    anatomy: Anatomy
    layout: Layout
    units: str

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        out = 1
        for size in self.anatomy.shape:
            out *= size
        return out

    @property
    def state_bytes(self) -> int:
        """Bytes of the aligned fp32 second moment."""
        out = 4
        for size in self.layout.aligned_shape(self.anatomy.shape):
            out *= size
        return out


def table(model: nn.Module, rules: Rules) -> list[Row]:
    """The rows of ``explain``, unrecognised parameters first."""
    rows = []
    for name, anatomy in discover(model).items():
        units = "+".join(dict.fromkeys(rules[part.role].value for part in anatomy.parts))
        rows.append(Row(name, anatomy, layout_of(anatomy, rules), units))
    return sorted(rows, key=lambda row: row.anatomy.recognised or len(row.anatomy.shape) < 2)


def explain(model: nn.Module, rules: str | Rules = "adam_mini") -> str:
    """A table of every parameter: what it is taken for, how it falls into blocks, and why.

    Args:
        model: the model.
        rules: a shipped set's name, a path, or ``Rules``.

    Returns:
        Plain text: name, shape, role, unit, number of blocks, bytes of second moment, weight decay, reason; what
        was not recognised comes first; totals and the saving against AdamW last.
    """
    loaded = Rules.load(rules)
    rows = table(model, loaded)
    header = ("parameter", "shape", "role", "unit", "blocks", "v bytes", "decay", "why")
    lines = [header]
    for row in rows:
        anatomy = row.anatomy
        why = anatomy.reason + (f"; {row.layout.note}" if row.layout.note else "")
        role = "+".join(r.value for r in anatomy.roles)
        marker = "" if anatomy.recognised or len(anatomy.shape) < 2 else "! "
        shape = "x".join(map(str, anatomy.shape)) or "scalar"
        lines.append((marker + row.name, shape, role, row.units, f"{row.layout.n_blocks:,}", f"{row.state_bytes:,}",
                      "yes" if anatomy.decays else "no", why))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    text = [f"rules: {loaded.name}"]
    text += ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join([*text, "", *_totals(rows)])


def _totals(rows: list[Row]) -> list[str]:
    """The last lines: how many scalars, how many bytes, against AdamW."""
    elements = sum(row.numel for row in rows)
    blocks = sum(row.layout.n_blocks for row in rows)
    held = sum(row.state_bytes for row in rows)
    unknown = [row for row in rows if not row.anatomy.recognised and len(row.anatomy.shape) >= 2]
    share = 100 * blocks / max(elements, 1)
    out = [
        f"{len(rows)} parameters, {elements:,} elements, {blocks:,} second-moment scalars ({share:.3f} % of AdamW's)",
        f"second moment: {held:,} bytes as stored against AdamW's {4 * elements:,} in fp32",
    ]
    if unknown:
        out.append(f"! {len(unknown)} weight(s) not recognised: they get the unit of OTHER")
    return out


def partition(model: nn.Module, rules: str | Rules = "adam_mini") -> Mapping[str, Layout]:
    """The layout of every parameter of a model.

    Args:
        model: any module; frozen parameters are described too.
        rules: a shipped set's name, a path to a rules file, or ``Rules``.

    Returns:
        name as in ``model.named_parameters()`` -> Layout.

    Raises:
        ValueError, FileNotFoundError: as ``Rules.load`` and ``discover``.
    """
    loaded = Rules.load(rules)
    return {name: layout_of(anatomy, loaded) for name, anatomy in discover(model).items()}
