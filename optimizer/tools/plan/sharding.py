"""Which elements of which parameters a rank holds.

Tensor parallelism cuts matrices by role: over output units what fans out (query, key, value, up, embedding, head), over
input units what comes back (attention out, down). Data parallelism then replicates (DDP), cuts the first axis in
ceil-sized chunks (FSDP2, as ``torch.chunk``), or cuts flattened elements (DeepSpeed ZeRO).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from optimizer.partition import Anatomy, Layout, Role

SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENT_DTYPES = (*DTYPES, "int8")

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
        exp_avg_dtype: of Adam-mini's first moment; None is the dtype of the parameters it steps.
        master: whether an fp32 copy of 16-bit parameters is kept; it is sharded as optimizer state is.

    Raises:
        ValueError: a number or a word out of range.
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

    @property
    def data_parallel(self) -> int:
        """Replicas: ranks along the data-parallel axis."""
        return self.world // self.tp

    @property
    def zero(self) -> int:
        """The ZeRO stage the sharding amounts to."""
        return 3 if self.sharding == "fsdp" else int(self.sharding[4:]) if self.sharding != "ddp" else 0

    @property
    def flat(self) -> bool:
        """Whether shards are ranges of flattened elements."""
        return self.sharding.startswith("zero")

    @property
    def stepped_dtype(self) -> str:
        """The dtype of the parameters the optimizer steps: the master copy's where there is one."""
        return "fp32" if self.master else self.dtype


@dataclass(frozen=True)
class Piece:
    """What a rank holds of one parameter: elements [start, stop) of a tensor of this shape, flattened row-major."""

    anatomy: Anatomy
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements held."""
        return self.stop - self.start

    def aligned(self, layout: Layout) -> int:
        """Values of the aligned second moment the held elements need; exact unless a range cuts several columns."""
        return _touched(self.shape, len(layout.leading), layout.axis, self.start, self.stop)


Held = Counter[Piece]
"""What one rank holds: pieces, and how many equal ones (the layers of a model repeat)."""


@lru_cache(maxsize=65536)
def _touched(shape: tuple[int, ...], leading: int, axis: int, start: int, stop: int) -> int:
    """Indices of (leading axes, axis) that elements [start, stop) reach.

    Exact for whole tensors and wherever no axis lies between the leading ones and ``axis`` (rows); otherwise
    (columns) an upper bound that is tight up to the range's two ends.
    """
    if stop <= start:
        return 0
    if not shape:
        return 1
    inner, outer = prod(shape[axis + 1 :]), prod(shape[leading:])
    reached = (stop - 1) // outer - start // outer + 1  # leading indices
    return min(reached * shape[axis], (stop - 1) // inner - start // inner + 1)


def tensor_parallel_shape(parameter: Parameter, tp: int) -> tuple[int, ...]:
    """The shape one tensor-parallel rank holds.

    Raises:
        ValueError: ``tp`` does not divide the units the parameter would be cut by; both numbers are named.
    """
    anatomy, shape = parameter.anatomy, list(parameter.anatomy.shape)
    axis = tensor_parallel_axis(anatomy)
    if tp == 1 or axis is None:
        return tuple(shape)
    for count, what in _units(anatomy) if set(anatomy.roles) <= _COLUMN else [(shape[axis], "input units")]:
        _divides(tp, count, what, parameter)
    shape[axis] //= tp
    return tuple(shape)


def tensor_parallel_axis(anatomy: Anatomy) -> int | None:
    """The axis that tensor parallelism cuts: output units of what fans out, input units of what comes back."""
    roles = set(anatomy.roles)
    if len(anatomy.shape) < 2 or not (roles <= _COLUMN or roles <= _ROW):
        return None
    return anatomy.axis if roles <= _COLUMN else anatomy.in_axis


def _units(anatomy: Anatomy) -> list[tuple[int, str]]:
    """What may be dealt out along the output axis: whole heads, else rows."""
    if anatomy.repeat > 1:
        return [(anatomy.repeat, "interleaved groups")]
    return [
        (part.size // (part.head_dim or 1), f"{part.role.value} {'heads' if part.head_dim else 'output units'}")
        for part in anatomy.parts
    ]


def _divides(tp: int, count: int, what: str, parameter: Parameter) -> None:
    if count % tp:
        raise ValueError(
            f"--tp {tp} does not divide the {count} {what} of {parameter.name!r} {parameter.anatomy.shape}; choose a "
            f"--tp that divides {count}, or pad the model"
        )


def held(parameters: Iterable[Parameter], setup: Setup, *, sharded: bool) -> list[Held]:
    """What the ranks of one replica group hold.

    Args:
        parameters: in the model's order.
        setup: how they are cut.
        sharded: whether data parallelism cuts these tensors (parameters, gradients or state) under the setup.

    Returns:
        One entry per data-parallel rank, or a single one where all ranks hold as much or the first one the most.
    """
    cut = [(p.anatomy, tensor_parallel_shape(p, setup.tp)) for p in parameters]
    ranks = setup.data_parallel
    if not sharded or ranks == 1:
        return [Counter(Piece(anatomy, shape, 0, prod(shape)) for anatomy, shape in cut)]
    if not setup.flat:  # torch.chunk: the first rank's chunk is the largest of every tensor
        chunks = [(a, (ceil(shape[0] / ranks), *shape[1:]) if shape else shape) for a, shape in cut]
        return [Counter(Piece(anatomy, shape, 0, prod(shape)) for anatomy, shape in chunks)]
    if setup.zero == 3:
        return _each_split(Counter(cut), ranks)
    return _buffer_split(cut, ranks)


def _each_split(cut: Counter[tuple[Anatomy, tuple[int, ...]]], ranks: int) -> list[Held]:
    """Every parameter flattened and split by itself (ZeRO-3)."""
    out: list[Held] = [Counter() for _ in range(ranks)]
    for (anatomy, shape), count in cut.items():
        numel, size = prod(shape), ceil(prod(shape) / ranks)
        for rank, mine in enumerate(out):
            start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
            if stop > start:
                mine[Piece(anatomy, shape, start, stop)] += count
    return out


def _buffer_split(cut: list[tuple[Anatomy, tuple[int, ...]]], ranks: int) -> list[Held]:
    """All parameters laid end to end in one buffer, split evenly (ZeRO-1, ZeRO-2)."""
    size = max(1, ceil(sum(prod(shape) for _, shape in cut) / ranks))
    out: list[Held] = [Counter() for _ in range(ranks)]
    offset = 0
    for anatomy, shape in cut:
        end = offset + prod(shape)
        for rank in range(offset // size, ceil(end / size)):
            start, stop = max(offset, rank * size), min(end, (rank + 1) * size)
            out[rank][Piece(anatomy, shape, start - offset, stop - offset)] += 1
        offset = end
    return out
