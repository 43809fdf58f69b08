"""Describe a model under a rule set, one row per parameter: its role, blocks, bytes of state, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, nn

from ...partition.apply import layout_of, understood
from ...partition.discover import discover
from ...partition.factored import TensorLayout
from ...partition.names import clean
from ...partition.roles import Anatomy, Role
from ...partition.rules import Rules
from ...step.dtypes import second_moment_dtype
from .collapse import collapse_names


@dataclass(frozen=True)
class Row:
    """A parameter under the rules, or several parameters that differ only in the index of their layer.

    Attributes:
        name: the parameter's name; a pattern such as ``layers.{0..31}.attn.wq.weight`` for several parameters.
        count: number of parameters that the row describes. All other numbers are those of one parameter.
        shape: shape of the parameter.
        dtype: dtype of the parameter, without the prefix ``torch.``.
        roles: roles of the parameter's parts, in order.
        units: names of the units whose elements share a scalar, without duplicates, in the order of the parts.
        layout: division of the parameter into blocks, or into factored parts.
        exp_avg_bytes: bytes of the first moment, in the parameter's dtype; 0 for a frozen parameter.
        exp_avg_sq_bytes: bytes of the stored second moment, aligned with the layout's axis; 0 for a frozen parameter.
        adamw_bytes: bytes of both moments of torch's AdamW, in the parameter's dtype; 0 for a frozen parameter.
        decays: whether weight decay applies.
        trainable: False for a frozen parameter, which has a layout but no state.
        recognised: whether the role is known, and the heads too if the rules need them.
        override: pattern of the override that determines the unit; None if no override matches.
        why: why the parameter has this role, and the note of its layout.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    roles: tuple[Role, ...]
    units: tuple[str, ...]
    layout: TensorLayout
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
    """Sums over all rows. Frozen parameters are counted separately, because they have no state.

    The bytes exclude the 4-byte ``step`` of each tensor, for Adam-mini and for AdamW.

    Attributes:
        parameters: number of trainable tensors.
        elements: number of their elements.
        blocks: number of their second-moment scalars.
        exp_avg_bytes: bytes of the first moments.
        exp_avg_sq_bytes: bytes of the second moments as stored.
        adamw_bytes: bytes of both moments of torch's AdamW.
        frozen: number of frozen tensors.
        frozen_elements: number of their elements.
        unrecognised: number of weights whose role is unknown.
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
    """A whole model under a rule set.

    Attributes:
        rules: the rules.
        rows: one row per parameter, unrecognised parameters first. After ``collapsed``, one row per group of parameters
            that differ only in the index of their layer.
    """

    rules: Rules
    rows: tuple[Row, ...]

    def collapsed(self) -> Explanation:
        """Return the explanation with one row for all parameters that differ only in the index of their layer."""
        likeness = [replace(row, name="", why=_renamed(row.why, row.name)) for row in self.rows]
        merged = collapse_names([row.name for row in self.rows], likeness)
        rows = [
            replace(row, name=name, count=len(members), why=_renamed(row.why, row.name, name))
            for name, members in merged
            for row in (self.rows[members[0]],)
        ]
        return Explanation(self.rules, tuple(rows))

    @property
    def totals(self) -> Totals:
        """Sums over all rows."""
        trainable = [row for row in self.rows if row.trainable]
        return Totals(
            parameters=sum(row.count for row in trainable),
            elements=sum(row.count * row.numel for row in trainable),
            blocks=sum(row.count * row.n_blocks for row in trainable),
            exp_avg_bytes=sum(row.count * row.exp_avg_bytes for row in trainable),
            exp_avg_sq_bytes=sum(row.count * row.exp_avg_sq_bytes for row in trainable),
            adamw_bytes=sum(row.count * row.adamw_bytes for row in trainable),
            frozen=sum(row.count for row in self.rows if not row.trainable),
            frozen_elements=sum(row.count * row.numel for row in self.rows if not row.trainable),
            unrecognised=sum(row.count for row in self.rows if not row.recognised),
        )


def explanation(model: nn.Module, rules: str | Rules = "adam_mini") -> Explanation:
    """Describe the role, blocks and bytes of state of every parameter, and the reasons.

    Args:
        model: any module; its parameters may be on the meta device. Frozen parameters are described and have no state.
        rules: name of a shipped set, path of a rules file, or ``Rules``.

    Raises:
        ValueError: the rules are unknown or invalid, or one of their overrides matches no parameter.
        FileNotFoundError: the rules file does not exist.
    """
    loaded, anatomies = Rules.load(rules), discover(model)
    loaded.require_matches(anatomies)
    parameters = dict(model.named_parameters())
    rows = [_row(name, parameters[name], anatomy, loaded) for name, anatomy in anatomies.items()]
    return Explanation(loaded, tuple(sorted(rows, key=lambda row: row.recognised)))


def _row(name: str, parameter: Tensor, anatomy: Anatomy, rules: Rules) -> Row:
    """Return the row of one parameter."""
    layout, override = layout_of(anatomy, rules, name), rules.override_for(name)
    trainable = parameter.requires_grad
    exp_avg_bytes = parameter.numel() * parameter.element_size() if trainable else 0
    shapes = layout.aligned_shape(anatomy.shape), layout.columns_shape(anatomy.shape)
    values = sum(prod(shape) for shape in shapes if shape is not None)
    exp_avg_sq_bytes = values * second_moment_dtype(parameter).itemsize
    reasons = ([f"override {override.pattern!r}"] if override else []) + [anatomy.reason, layout.note]
    return Row(
        name=name,
        count=1,
        shape=anatomy.shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        roles=anatomy.roles,
        units=tuple(dict.fromkeys(rules.unit_for(name, part.role).value for part in anatomy.parts)),
        layout=layout,
        exp_avg_bytes=exp_avg_bytes,
        exp_avg_sq_bytes=exp_avg_sq_bytes if trainable else 0,
        adamw_bytes=2 * exp_avg_bytes,
        decays=anatomy.decays,
        trainable=trainable,
        recognised=understood(anatomy, rules, name) and (anatomy.recognised or len(anatomy.shape) < 2),
        override=override.pattern if override else None,
        why="; ".join(filter(None, reasons)),
    )


def _renamed(why: str, name: str, new_name: str = "") -> str:
    """Replace the parameter's name in a reason, so that the reasons of equal layers are equal."""
    return why.replace(name, new_name).replace(clean(name), clean(new_name))


@dataclass(frozen=True)
class Change:
    """A parameter whose layout differs between two rule sets, or several that differ only in their layer's index.

    Attributes:
        left: the parameter under the first rules.
        right: the parameter under the second rules.
    """

    left: Row
    right: Row

    @property
    def bytes_change(self) -> int:
        """Bytes of one parameter's state under the second rules minus those under the first rules."""
        return self.right.state_bytes - self.left.state_bytes


@dataclass(frozen=True)
class Comparison:
    """The parameters of a model whose layouts differ between two rule sets.

    Attributes:
        left: the first rules.
        right: the second rules.
        changes: the parameters, in the model's order.
    """

    left: Rules
    right: Rules
    changes: tuple[Change, ...]

    def collapsed(self) -> Comparison:
        """Return the comparison with one change for all parameters that differ only in the index of their layer."""
        alike = [tuple(replace(row, name="", why="") for row in (change.left, change.right)) for change in self.changes]
        changes = [
            Change(*(replace(row, name=name, count=len(members)) for row in (change.left, change.right)))
            for name, members in collapse_names([change.left.name for change in self.changes], alike)
            for change in (self.changes[members[0]],)
        ]
        return Comparison(self.left, self.right, tuple(changes))


def compare(model: nn.Module, left: str | Rules, right: str | Rules) -> Comparison:
    """Find the parameters whose layouts differ between two rule sets.

    Args:
        model: any module.
        left: the first rules: name of a shipped set, path of a rules file, or ``Rules``.
        right: the second rules, in the same forms. Changes are counted from left to right.

    Raises:
        ValueError: the rules are unknown or invalid, or one of their overrides matches no parameter.
        FileNotFoundError: a rules file does not exist.
    """
    first, second = explanation(model, left), explanation(model, right)
    second_rows = {row.name: row for row in second.rows}
    names = dict.fromkeys(name for name, _ in model.named_parameters())
    first_rows = {row.name: row for row in first.rows}
    changes = [Change(first_rows[n], second_rows[n]) for n in names if first_rows[n].layout != second_rows[n].layout]
    return Comparison(first.rules, second.rules, tuple(changes))


def explain(model: nn.Module, rules: str | Rules = "adam_mini", *, collapse: bool = True) -> str:
    """Return a table of the role and blocks of every parameter, and the reasons.

    Args:
        model: the model; its parameters may be on the meta device.
        rules: name of a shipped set, path of a rules file, or ``Rules``.
        collapse: write one row for all parameters that differ only in the index of their layer.

    Returns:
        Plain text with the columns name, count, shape, role, unit, blocks, bytes of the first and of the second moment,
        blocks and bytes summed over the row's parameters, weight decay, reason. Unrecognised parameters come first and
        are marked with "!". The last lines are the totals and the bytes saved compared with AdamW.

    Raises:
        ValueError: the rules are unknown or invalid, or one of their overrides matches no parameter.
        FileNotFoundError: the rules file does not exist.
    """
    from .render import explanation_text

    whole = explanation(model, rules)
    return explanation_text(whole.collapsed() if collapse else whole)
