"""The words of the partition: what a parameter does, and what may share one second-moment scalar."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a parameter (or a part of a fused one) does in the network."""

    TOKEN_EMBEDDING = "TOKEN_EMBEDDING"
    POSITION_EMBEDDING = "POSITION_EMBEDDING"
    QUERY = "QUERY"
    KEY = "KEY"
    VALUE = "VALUE"
    ATTENTION_OUT = "ATTENTION_OUT"
    MLP_IN = "MLP_IN"  # up, gate, and every dense layer of which nothing more is known
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
    """What shares one second-moment scalar."""

    TENSOR = "TENSOR"
    ATTENTION_HEAD = "ATTENTION_HEAD"
    OUT_NEURON = "OUT_NEURON"  # a row of a Linear: one index of the output axis
    IN_NEURON = "IN_NEURON"  # a column of a Linear: one index of the input axis
    TOKEN = "TOKEN"  # a row of an embedding table or of the output layer
    ELEMENT = "ELEMENT"  # Adam


HEAD_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE})
"""The roles whose output units belong to attention heads."""


@dataclass(frozen=True)
class Part:
    """A run of indices along a tensor's output axis that do the same thing.

    Attributes:
        role: what these indices do.
        size: how many there are.
        head_dim: how many consecutive ones form an attention head; None where there are no heads, or where
            nobody could tell (the rules then fall back to one scalar per index).
        shared: whether the same units do a second thing too (Reformer's queries are its keys, DeepSeek-V4's keys its
            values); ``role`` is the one with the finer unit.
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
    """The shape with axis 0 split into (fold, rest); the shape itself for fold 1.

    Raises:
        ValueError: axis 0 does not divide.
    """
    if fold == 1:
        return shape
    if not shape or fold < 1 or shape[0] % fold:
        raise ValueError(f"axis 0 of shape {shape} does not split into fold={fold} equal pieces")
    return (fold, shape[0] // fold, *shape[1:])


@dataclass(frozen=True)
class Anatomy:
    """How one tensor is made, whatever the rules later do with it.

    Attributes:
        shape: the full tensor's shape.
        axis: the axis of its output units (tokens, for an embedding).
        in_axis: the axis of its input units; None where there is none (norms, biases, position vectors).
        leading: how many axes in front (experts, for instance) repeat the pattern independently.
        parts: the parts along ``axis``, in order; their sizes times ``repeat`` add up to ``shape[axis]``.
        repeat: how often the sequence of parts repeats along ``axis`` (interleaved heads).
        fold: how many pieces axis 0 is split into before anything else: experts, or groups of a transposed
            convolution, that the tensor keeps one behind the other. The axes above are those of the split view.
        declared: False where no family speaks of the tensor and only its layer is known.
        trainable: False for integers a quantiser packed, which no step ever reads.
        reason: why the parts were chosen, in words, for ``explain``.
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
        found = self.repeat * sum(part.size for part in self.parts)
        if found != expected:
            raise ValueError(
                f"the parts of this tensor add up to {found} indices, but axis {self.axis} of its shape "
                f"{view} has {expected} ({self.reason}); the module's configuration contradicts its weights"
            )

    @property
    def role(self) -> Role:
        """The role of the first part: the whole tensor's role unless it is fused."""
        return self.parts[0].role

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role in the tensor, once, in order."""
        return tuple(dict.fromkeys(part.role for part in self.parts))

    @property
    def recognised(self) -> bool:
        """Whether enough is known of this tensor to train it."""
        return Role.OTHER not in self.roles or not self.trainable

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to weights of two dimensions and more, not to norms and biases."""
        return len(self.shape) >= 2 and not {Role.NORM, Role.BIAS} & set(self.roles)


def whole(role: Role, shape: tuple[int, ...], reason: str, *, axis: int = 0, in_axis: int | None = None) -> Anatomy:
    """The anatomy of a tensor that does one thing, its output units along ``axis``."""
    size = shape[axis] if shape else 1
    return Anatomy(shape, (Part(role, size),), reason, axis=axis, in_axis=in_axis)
