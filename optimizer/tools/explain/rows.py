"""A model under a rule set as rows that a person can check: every parameter, its blocks, its bytes, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, nn

from ...partition.apply import layout_of, understood
from ...partition.discover import discover
from ...partition.layout import Layout
from ...partition.names import clean
from ...partition.roles import Anatomy, Role
from ...partition.rules import Rules
from ...step.dtypes import second_moment_dtype
from .collapse import collapse_names


@dataclass(frozen=True)
class Row:
    """A parameter under the rules, or several that differ in their layer's index alone.

    Attributes:
        name: the parameter's name; ``layers.{0..31}.attn.wq.weight`` for several.
        count: how many parameters the row stands for. All numbers below are of one of them.
        shape: its shape.
        dtype: its dtype.
        roles: what its parts do, in order.
        units: what shares a scalar, in the same order.
        layout: how it falls into blocks.
        exp_avg_bytes: bytes of the first moment, in the parameter's dtype; 0 for a frozen parameter.
        exp_avg_sq_bytes: bytes of the aligned second moment as stored; likewise.
        adamw_bytes: bytes of both moments of torch's AdamW, in the parameter's dtype; likewise.
        decays: whether weight decay applies.
        trainable: False for a frozen parameter, which has a layout but no state.
        recognised: whether the role is known (and the heads, where the rules ask for them).
        override: the pattern of the rules that gave it its unit, if one did.
        why: why it was taken for this, and what is particular about its layout.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    roles: tuple[Role, ...]
    units: tuple[str, ...]
    layout: Layout
    exp_avg_bytes: int
    exp_avg_sq_bytes: int
    adamw_bytes: int
    decays: bool
    trainable: bool
    recognised: bool
    override: str | None
    why: str

    @property
    def numel(self) -> int:
        """Elements of one parameter."""
        return prod(self.shape)

    @property
    def n_blocks(self) -> int:
        """Second-moment scalars of one parameter."""
        return self.layout.n_blocks

    @property
    def state_bytes(self) -> int:
        """Bytes of both moments of one parameter."""
        return self.exp_avg_bytes + self.exp_avg_sq_bytes


@dataclass(frozen=True)
class Totals:
    """Sums over all rows; frozen parameters count apart, for they have no state.

    Attributes:
        parameters: trainable tensors.
        elements: their elements.
        blocks: their second-moment scalars.
        exp_avg_bytes: bytes of the first moments.
        exp_avg_sq_bytes: bytes of the second moments as stored.
        adamw_bytes: bytes of both moments of torch's AdamW. The 4-byte step of each tensor is in neither.
        frozen: frozen tensors.
        frozen_elements: their elements.
        unrecognised: weights that nobody recognised.
    """

    parameters: int
    elements: int
    blocks: int
    exp_avg_bytes: int
    exp_avg_sq_bytes: int
    adamw_bytes: int
    frozen: int
    frozen_elements: int
    unrecognised: int

    @property
    def state_bytes(self) -> int:
        """Bytes of both moments."""
        return self.exp_avg_bytes + self.exp_avg_sq_bytes


@dataclass(frozen=True)
class Explanation:
    """A whole model under a set of rules.

    Attributes:
        rules: the rules.
        rows: a row per parameter (or per group of like ones, after ``collapsed``), what was not recognised first.
    """

    rules: Rules
    rows: tuple[Row, ...]

    def collapsed(self) -> Explanation:
        """The same with one row for parameters that are alike in everything but the index of their layer."""
        likeness = [replace(row, name="", why=_nameless(row.why, row.name)) for row in self.rows]
        merged = collapse_names([row.name for row in self.rows], likeness)
        rows = [
            replace(row, name=name, count=len(members), why=_nameless(row.why, row.name, name))
            for name, members in merged
            for row in (self.rows[members[0]],)
        ]
        return Explanation(self.rules, tuple(rows))

    @property
    def totals(self) -> Totals:
        """Sums over all rows."""
        live = [row for row in self.rows if row.trainable]
        return Totals(
            parameters=sum(row.count for row in live),
            elements=sum(row.count * row.numel for row in live),
            blocks=sum(row.count * row.n_blocks for row in live),
            exp_avg_bytes=sum(row.count * row.exp_avg_bytes for row in live),
            exp_avg_sq_bytes=sum(row.count * row.exp_avg_sq_bytes for row in live),
            adamw_bytes=sum(row.count * row.adamw_bytes for row in live),
            frozen=sum(row.count for row in self.rows if not row.trainable),
            frozen_elements=sum(row.count * row.numel for row in self.rows if not row.trainable),
            unrecognised=sum(row.count for row in self.rows if not row.recognised),
        )


def explanation(model: nn.Module, rules: str | Rules = "adam_mini") -> Explanation:
    """What every parameter is taken for, how it falls into blocks, what that costs, and why.

    Args:
        model: any module, on the meta device too; frozen parameters are described, but have no state.
        rules: a shipped set's name, a path to a rules file, or ``Rules``.

    Raises:
        ValueError, FileNotFoundError: as ``partition``.
    """
    loaded, anatomies = Rules.load(rules), discover(model)
    loaded.require_matches(anatomies)
    parameters = dict(model.named_parameters())
    rows = [_row(name, parameters[name], anatomy, loaded) for name, anatomy in anatomies.items()]
    return Explanation(loaded, tuple(sorted(rows, key=lambda row: row.recognised)))


def _row(name: str, parameter: Tensor, anatomy: Anatomy, rules: Rules) -> Row:
    """One parameter under the rules."""
    layout, override = layout_of(anatomy, rules, name), rules.override_for(name)
    trainable = parameter.requires_grad
    held = parameter.numel() * parameter.element_size() if trainable else 0
    aligned = prod(layout.aligned_shape(anatomy.shape)) * second_moment_dtype(parameter).itemsize
    reasons = ([f"override {override.pattern!r}"] if override else []) + [anatomy.reason, layout.note]
    return Row(
        name=name,
        count=1,
        shape=anatomy.shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        roles=anatomy.roles,
        units=tuple(dict.fromkeys(rules.unit_for(name, part.role).value for part in anatomy.parts)),
        layout=layout,
        exp_avg_bytes=held,
        exp_avg_sq_bytes=aligned if trainable else 0,
        adamw_bytes=2 * held,
        decays=anatomy.decays,
        trainable=trainable,
        recognised=understood(anatomy, rules, name) and (anatomy.recognised or len(anatomy.shape) < 2),
        override=override.pattern if override else None,
        why="; ".join(filter(None, reasons)),
    )


def _nameless(why: str, name: str, instead: str = "") -> str:
    """A reason without the parameter's own name, which would tell otherwise equal layers apart."""
    return why.replace(name, instead).replace(clean(name), clean(instead))


@dataclass(frozen=True)
class Change:
    """A parameter whose layout differs between two sets of rules, or several that are alike.

    Attributes:
        left: the parameter under the first rules.
        right: the same under the second.
    """

    left: Row
    right: Row

    @property
    def bytes_change(self) -> int:
        """How many more bytes of state one parameter has under the second rules."""
        return self.right.state_bytes - self.left.state_bytes


@dataclass(frozen=True)
class Comparison:
    """The parameters of a model whose layouts differ between two sets of rules.

    Attributes:
        left: the first rules.
        right: the second.
        changes: the parameters, in the model's order.
    """

    left: Rules
    right: Rules
    changes: tuple[Change, ...]

    def collapsed(self) -> Comparison:
        """The same with one row for parameters that are alike in everything but the index of their layer."""
        alike = [tuple(replace(row, name="", why="") for row in (change.left, change.right)) for change in self.changes]
        changes = [
            Change(*(replace(row, name=name, count=len(members)) for row in (change.left, change.right)))
            for name, members in collapse_names([change.left.name for change in self.changes], alike)
            for change in (self.changes[members[0]],)
        ]
        return Comparison(self.left, self.right, tuple(changes))


def compare(model: nn.Module, left: str | Rules, right: str | Rules) -> Comparison:
    """The parameters whose layouts differ between two sets of rules.

    Args:
        model: any module.
        left: a shipped set's name, a path to a rules file, or ``Rules``.
        right: the set to compare with; changes are counted from left to right.

    Raises:
        ValueError, FileNotFoundError: as ``partition``.
    """
    one, other = explanation(model, left), explanation(model, right)
    second = {row.name: row for row in other.rows}
    names = dict.fromkeys(name for name, _ in model.named_parameters())
    first = {row.name: row for row in one.rows}
    changes = [Change(first[n], second[n]) for n in names if first[n].layout != second[n].layout]
    return Comparison(one.rules, other.rules, tuple(changes))


def explain(model: nn.Module, rules: str | Rules = "adam_mini", *, collapse: bool = True) -> str:
    """A table of every parameter: what it is taken for, how it falls into blocks, and why.

    Args:
        model: the model.
        rules: a shipped set's name, a path, or ``Rules``.
        collapse: one row for parameters that are alike in everything but the index of their layer.

    Returns:
        Plain text: name, count, shape, role, unit, blocks, bytes of first and second moment, sums over the row's
        parameters, weight decay, reason; what was not recognised comes first, marked with "!"; totals and the saving
        against AdamW last.

    Raises:
        ValueError, FileNotFoundError: as ``partition``.
    """
    from .render import explanation_text

    found = explanation(model, rules)
    return explanation_text(found.collapsed() if collapse else found)
