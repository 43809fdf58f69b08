"""The setup of a training run, and how tensor parallelism shards a model's tensors under it.

Tensor parallelism shards matrices by role: along the output units for query, key, value, MLP input, token embedding and
head, and along the input units for attention output and MLP output. Data parallelism then replicates tensors (DDP),
shards their first axis (FSDP2), or shards their flattened elements (ZeRO). ``holdings`` computes the resulting shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ...partition import Anatomy, Role
from ...step.moments import FORMATS

SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENT_DTYPES = (*DTYPES, *FORMATS)

_COLUMN = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.MLP_IN, Role.EXPERT_IN, Role.HEAD, Role.TOKEN_EMBEDDING})
_ROW = frozenset({Role.ATTENTION_OUT, Role.MLP_OUT, Role.EXPERT_OUT})


@dataclass(frozen=True)
class Parameter:
    """A parameter's name and anatomy, and whether it is trainable."""

    name: str
    anatomy: Anatomy
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements of the whole parameter."""
        return prod(self.anatomy.shape)


@dataclass(frozen=True)
class Setup:
    """The parallelism and dtypes of a training run.

    Attributes:
        world: number of all ranks, >= 1.
        tp: number of tensor-parallel ranks; divides ``world``.
        sharding: one of ``SHARDINGS``.
        dtype: dtype of parameters and gradients, one of ``DTYPES``.
        exp_avg_dtype: a dtype or a format of ``optimizer.step.moments`` for Adam-mini's first moment; None for the
            dtype of the parameters that the optimizer steps.
        master: whether there is an fp32 copy of 16-bit parameters. It is sharded like optimizer state.

    Raises:
        ValueError: an attribute is out of range.
    """

    world: int = 1
    tp: int = 1
    sharding: str = "ddp"
    dtype: str = "bf16"
    exp_avg_dtype: str | None = None
    master: bool = False

    def __post_init__(self) -> None:
        for name, number in (("world", self.world), ("tp", self.tp)):
            if number < 1:
                raise ValueError(f"--{name} {number} must be a number of ranks >= 1")
        if self.world % self.tp:
            raise ValueError(
                f"--tp {self.tp} does not divide --world {self.world}; world counts all ranks, tensor-parallel ones too"
            )
        choices = (
            ("sharding", self.sharding, SHARDINGS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("exp-avg-dtype", self.exp_avg_dtype or "fp32", MOMENT_DTYPES),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"--{name} {value!r} is not one of {', '.join(allowed)}")

    @property
    def data_parallel(self) -> int:
        """Number of data-parallel ranks."""
        return self.world // self.tp

    @property
    def zero(self) -> int:
        """The equivalent ZeRO stage: 3 for FSDP2, 0 for DDP."""
        return 3 if self.sharding == "fsdp" else int(self.sharding[4:]) if self.sharding != "ddp" else 0

    @property
    def flat(self) -> bool:
        """Whether shards are ranges of flattened elements."""
        return self.sharding.startswith("zero")

    @property
    def stepped_dtype(self) -> str:
        """Dtype of the tensors that the optimizer steps: fp32 if there is a master copy, else the parameters' dtype."""
        return "fp32" if self.master else self.dtype


def by_decay(parameters: Sequence[Parameter]) -> list[list[int]]:
    """Return the indices of the parameters with weight decay and of those without, leaving out empty groups."""
    both = ([i for i, p in enumerate(parameters) if p.anatomy.decays is decays] for decays in (True, False))
    return [group for group in both if group]


def require_divisible(parameter: Parameter, tp: int) -> None:
    """Check that ``tp`` divides the units along which tensor parallelism shards the parameter.

    Raises:
        ValueError: it does not. The message contains both numbers and the parameter's name.
    """
    anatomy, axis = parameter.anatomy, tensor_parallel_axis(parameter.anatomy)
    if axis is None:
        return
    by_output_units = set(anatomy.roles) <= _COLUMN
    for count, what in _units(anatomy) if by_output_units else [(anatomy.shape[axis], "input units")]:
        if count % tp:
            raise ValueError(
                f"--tp {tp} does not divide the {count} {what} of {parameter.name!r} {anatomy.shape}; choose a "
                f"--tp that divides {count}, or pad the model"
            )


def tensor_parallel_shape(parameter: Parameter, tp: int) -> tuple[int, ...]:
    """Return the shape of a parameter's shard on one tensor-parallel rank.

    Raises:
        ValueError: ``tp`` does not divide the units along which the parameter is sharded.
    """
    require_divisible(parameter, tp)
    axis, shape = tensor_parallel_axis(parameter.anatomy), parameter.anatomy.shape
    return shape if axis is None else tuple(size // tp if i == axis else size for i, size in enumerate(shape))


def tensor_parallel_axis(anatomy: Anatomy) -> int | None:
    """Return the axis that tensor parallelism shards; None if it replicates the tensor.

    It is the axis of output units for roles in ``_COLUMN`` and of input units for roles in ``_ROW``. An anatomy with a
    fold counts axes after splitting axis 0 into (fold, rest); both of these belong to axis 0 of the tensor.
    """
    roles = set(anatomy.roles)
    if len(anatomy.shape) < 2 or not (roles <= _COLUMN or roles <= _ROW):
        return None
    axis = anatomy.axis if roles <= _COLUMN else anatomy.in_axis
    return axis if axis is None or anatomy.fold == 1 else max(axis - 1, 0)


def _units(anatomy: Anatomy) -> list[tuple[int, str]]:
    """Return (count, name) of the units that a shard along the output axis must contain whole."""
    if anatomy.fold > 1 and anatomy.axis <= 1:
        return [(anatomy.fold, "folded parts")]
    if anatomy.repeat > 1:
        return [(anatomy.repeat, "interleaved groups")]
    return [
        (part.size // (part.head_dim or 1), f"{part.role.value} {'heads' if part.head_dim else 'output units'}")
        for part in anatomy.parts
    ]
