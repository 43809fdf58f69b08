"""Roles, units and anatomies: what a parameter does, and which of its elements may share a second-moment scalar."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a parameter, or a part of a fused parameter, does in the network."""

    TOKEN_EMBEDDING = "TOKEN_EMBEDDING"
    POSITION_EMBEDDING = "POSITION_EMBEDDING"
    QUERY = "QUERY"
    KEY = "KEY"
    VALUE = "VALUE"
    ATTENTION_OUT = "ATTENTION_OUT"
    MLP_IN = "MLP_IN"  # up and gate projections, and every dense layer without a more specific role
    MLP_OUT = "MLP_OUT"
    HEAD = "HEAD"  # the output layer
    EXPERT_IN = "EXPERT_IN"
    EXPERT_OUT = "EXPERT_OUT"
    NORM = "NORM"
    BIAS = "BIAS"
    CONV = "CONV"
    LORA_A = "LORA_A"
    LORA_B = "LORA_B"
    OTHER = "OTHER"


class Unit(str, Enum):
    """The elements that share one second-moment scalar, or the form of the second moment (``FACTORED``)."""

    TENSOR = "TENSOR"
    ATTENTION_HEAD = "ATTENTION_HEAD"
    OUT_NEURON = "OUT_NEURON"  # a row of a Linear: one index of the output axis
    IN_NEURON = "IN_NEURON"  # a column of a Linear: one index of the input axis
    TOKEN = "TOKEN"  # a row of an embedding table or of the output layer
    ELEMENT = "ELEMENT"  # every element has its own scalar, as in Adam
    FACTORED = "FACTORED"  # rank one: the mean of the row times that of the column, divided by the mean of all


HEAD_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE})
"""The roles whose output units belong to attention heads."""


@dataclass(frozen=True)
class Part:
    """Consecutive indices along a tensor's output axis that have the same role.

    Attributes:
        role: what these output units do.
        size: the number of indices.
        head_dim: how many consecutive indices form an attention head; None if there are no heads or their size is
            unknown. If it is unknown, rules that ask for heads use one scalar per index.
        shared: whether the same units have a second role (Reformer's queries are also its keys, DeepSeek-V4's keys
            are also its values); ``role`` is the one with the finer unit.

    Raises:
        ValueError: ``head_dim`` is not positive or does not divide ``size``.
    """

    role: Role
    size: int
    head_dim: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.head_dim is not None and (self.head_dim <= 0 or self.size % self.head_dim):
            raise ValueError(
                f"{self.size} {self.role.value} units do not divide into heads of head_dim={self.head_dim}; "
                "check the attention module's head_dim / number of heads against the tensor's shape"
            )


def viewed(shape: tuple[int, ...], fold: int) -> tuple[int, ...]:
    """Return the shape with axis 0 split into (fold, rest); for ``fold`` = 1, the shape itself.

    Raises:
        ValueError: ``fold`` does not divide axis 0.
    """
    if fold == 1:
        return shape
    if not shape or fold < 1 or shape[0] % fold:
        raise ValueError(f"axis 0 of shape {shape} does not split into fold={fold} equal pieces")
    return (fold, shape[0] // fold, *shape[1:])


@dataclass(frozen=True)
class Anatomy:
    """What the indices of one tensor do in the network, independently of any rules.

    Attributes:
        shape: the shape of the whole tensor.
        parts: the parts along ``axis``, in order; the sum of their sizes times ``repeat`` is the size of ``axis``.
        reason: why these parts were chosen; shown by ``explain``.
        axis: the axis of the output units (of the tokens, for an embedding).
        in_axis: the axis of the input units; None if there is none (norms, biases, position vectors).
        leading: the number of first axes, such as experts, whose indices each have the same parts independently.
        repeat: how often the sequence of parts repeats along ``axis`` (interleaved heads).
        fold: the number of equal pieces that axis 0 is split into first, for tensors that concatenate experts, or the
            groups of a transposed convolution, along axis 0; 1 for no split. ``axis``, ``in_axis`` and ``leading``
            count the axes after the split.
        declared: whether a family describes the tensor; False if only its layer or its name is known.
        trainable: False for integers packed by a quantiser, which are never trained.

    Raises:
        ValueError: the sizes of the parts do not add up to the size of ``axis``.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    reason: str
    axis: int = 0
    in_axis: int | None = None
    leading: int = 0
    repeat: int = 1
    fold: int = 1
    declared: bool = True
    trainable: bool = True

    def __post_init__(self) -> None:
        view = viewed(self.shape, self.fold)
        expected = view[self.axis] if view else 1
        covered = self.repeat * sum(part.size for part in self.parts)
        if covered != expected:
            raise ValueError(
                f"the parts of this tensor add up to {covered} indices, but axis {self.axis} of its shape "
                f"{view} has {expected} ({self.reason}); the module's configuration contradicts its weights"
            )

    @property
    def role(self) -> Role:
        """The role of the first part; the role of the whole tensor unless it is fused."""
        return self.parts[0].role

    @property
    def roles(self) -> tuple[Role, ...]:
        """The distinct roles in the tensor, in order."""
        return tuple(dict.fromkeys(part.role for part in self.parts))

    @property
    def recognised(self) -> bool:
        """Whether the role of every part is known; always True for tensors that are never trained."""
        return Role.OTHER not in self.roles or not self.trainable

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to weights of two or more dimensions, but not to norms and biases."""
        return len(self.shape) >= 2 and not {Role.NORM, Role.BIAS} & set(self.roles)


def whole(role: Role, shape: tuple[int, ...], reason: str, *, axis: int = 0, in_axis: int | None = None) -> Anatomy:
    """Return the anatomy of a tensor with a single role, whose output units lie along ``axis``."""
    size = shape[axis] if shape else 1
    return Anatomy(shape, (Part(role, size),), reason, axis=axis, in_axis=in_axis)
