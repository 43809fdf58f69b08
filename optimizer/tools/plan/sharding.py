"""How a model is trained, and how its tensors are cut for that.

Tensor parallelism cuts matrices by role: over output units what fans out (query, key, value, up, embedding, head), over
input units what comes back (attention out, down). Data parallelism then replicates (DDP), cuts the first axis (FSDP2),
or cuts flattened elements (ZeRO). ``holdings`` says what a rank has then.
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
    """One parameter: its name, what it is, and whether it trains."""

    name: str
    anatomy: Anatomy
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.anatomy.shape)


@dataclass(frozen=True)
class Setup:
    """How the model is trained.

    Attributes:
        world: all ranks, >= 1.
        tp: ranks that share one replica's matrices; divides ``world``.
        sharding: one of ``SHARDINGS``.
        dtype: of parameters and gradients.
        exp_avg_dtype: of Adam-mini's first moment, a float dtype or a format of ``optimizer.step.moments``; None is the
            dtype of the parameters it steps.
        master: whether an fp32 copy of 16-bit parameters is kept; it is sharded as optimizer state is.

    Raises:
        ValueError: a number or a word out of range; a quantised first moment where parameters are sharded.
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
        choices = (("sharding", self.sharding, SHARDINGS), ("dtype", self.dtype, tuple(DTYPES)),
                   ("exp-avg-dtype", self.exp_avg_dtype or "fp32", MOMENT_DTYPES))  # fmt: skip
        for name, word, known in choices:
            if word not in known:
                raise ValueError(f"--{name} {word!r} is not one of {', '.join(known)}")
        if self.exp_avg_dtype in FORMATS and self.sharded:
            raise ValueError(
                f"--exp-avg-dtype {self.exp_avg_dtype!r} keeps scales that do not reshard with their parameter, and "
                f"{self.sharded} shards parameters, so AdamMini refuses it; choose fp32 or bf16, or leave out "
                f"{self.sharded.split()[0]}"
            )

    @property
    def data_parallel(self) -> int:
        """Replicas: ranks along the data-parallel axis."""
        return self.world // self.tp

    @property
    def zero(self) -> int:
        """The ZeRO stage the sharding amounts to."""
        return 3 if self.sharding == "fsdp" else int(self.sharding[4:]) if self.sharding != "ddp" else 0

    @property
    def sharded(self) -> str:
        """The argument that shards what the optimizer steps, with its number of ranks; empty where none does."""
        if self.sharding != "ddp" and self.data_parallel > 1:
            flag = "--fsdp" if self.sharding == "fsdp" else f"--zero {self.zero}"
            return f"{flag} over {self.data_parallel} ranks"
        return f"--tp {self.tp}" if self.tp > 1 else ""

    @property
    def flat(self) -> bool:
        """Whether shards are ranges of flattened elements."""
        return self.sharding.startswith("zero")

    @property
    def stepped_dtype(self) -> str:
        """The dtype of the parameters the optimizer steps: the master copy's where there is one."""
        return "fp32" if self.master else self.dtype


def by_decay(parameters: Sequence[Parameter]) -> list[list[int]]:
    """The parameter groups of an optimizer that was built from a model: which parameters decay, and which do not."""
    both = ([i for i, p in enumerate(parameters) if p.anatomy.decays is decays] for decays in (True, False))
    return [group for group in both if group]


def require_divisible(parameter: Parameter, tp: int) -> None:
    """Refuse a ``tp`` that does not divide the units that the parameter would be cut by.

    Raises:
        ValueError: both numbers are named.
    """
    anatomy, axis = parameter.anatomy, tensor_parallel_axis(parameter.anatomy)
    if axis is None:
        return
    columns = set(anatomy.roles) <= _COLUMN
    for count, what in _units(anatomy) if columns else [(anatomy.shape[axis], "input units")]:
        if count % tp:
            raise ValueError(
                f"--tp {tp} does not divide the {count} {what} of {parameter.name!r} {anatomy.shape}; choose a "
                f"--tp that divides {count}, or pad the model"
            )


def tensor_parallel_shape(parameter: Parameter, tp: int) -> tuple[int, ...]:
    """The shape one tensor-parallel rank holds.

    Raises:
        ValueError: as ``require_divisible``.
    """
    require_divisible(parameter, tp)
    axis, shape = tensor_parallel_axis(parameter.anatomy), parameter.anatomy.shape
    return shape if axis is None else tuple(size // tp if i == axis else size for i, size in enumerate(shape))


def tensor_parallel_axis(anatomy: Anatomy) -> int | None:
    """The axis that tensor parallelism cuts: output units of what fans out, input units of what comes back.

    An anatomy counts axes after its fold. Where that splits the axis to be cut, the fold's pieces are dealt out.
    """
    roles = set(anatomy.roles)
    if len(anatomy.shape) < 2 or not (roles <= _COLUMN or roles <= _ROW):
        return None
    axis = anatomy.axis if roles <= _COLUMN else anatomy.in_axis
    return axis if axis is None or anatomy.fold == 1 else max(axis - 1, 0)


def _units(anatomy: Anatomy) -> list[tuple[int, str]]:
    """What may be dealt out along the output axis: whole pieces of a fold, whole heads, else rows."""
    if anatomy.fold > 1 and anatomy.axis <= 1:
        return [(anatomy.fold, "folded pieces")]
    if anatomy.repeat > 1:
        return [(anatomy.repeat, "interleaved groups")]
    return [
        (part.size // (part.head_dim or 1), f"{part.role.value} {'heads' if part.head_dim else 'output units'}")
        for part in anatomy.parts
    ]
