"""The accounting: bytes per rank of parameters, gradients, optimizer state by kind, and a step's temporaries.

Pure functions over what ``sharding.held`` says a rank holds. What is assumed is in ``notes`` and printed with every
table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.partition import Rules, layout_of

from .sharding import DTYPES, Held, Parameter, Piece, Setup, held
from .states import FP32, Cost, State, adam_mini, adamw, adamw_8bit

DEFAULT_RULES = ("adam_mini", "short_run", "pytorch_default", "slim_adam")


@dataclass(frozen=True)
class Row:
    """One optimizer on the rank where it needs the most.

    Attributes:
        optimizer: its name.
        parameters, gradients, master: bytes of that rank.
        state: its optimizer state.
        n_blocks: second-moment scalars of the whole model.
    """

    optimizer: str
    parameters: int
    gradients: int
    master: int
    state: State
    n_blocks: int

    @property
    def resident(self) -> int:
        """Bytes between backward pass and step: parameters, gradients, master copy, optimizer state."""
        return self.parameters + self.gradients + self.master + self.state.total

    @property
    def peak(self) -> int:
        """Bytes during the step."""
        return self.resident + self.state.temporary


@dataclass(frozen=True)
class Plan:
    """Every optimizer under one setup.

    Attributes:
        setup: how the model is trained.
        elements: elements of the whole model.
        trainable: those that train.
        rows: the optimizers; the first two are AdamW, its states in the parameters' dtype and in fp32.
        unrecognised: names of the weights of two or more dimensions whose role is OTHER.
        notes: what was assumed.
    """

    setup: Setup
    elements: int
    trainable: int
    rows: tuple[Row, ...]
    unrecognised: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def row(self, optimizer: str) -> Row:
        """The row of an optimizer, by its name."""
        return next(row for row in self.rows if row.optimizer == optimizer)


def worst(parameters: list[Held], gradients: list[Held], states: list[Held], cost: Cost, setup: Setup,
          *, all_at_once: bool = False) -> tuple[int, int, int, State]:  # fmt: skip
    """(parameters, gradients, master copy, state) of the rank that needs the most, in bytes.

    Args:
        parameters: per rank, all parameters held.
        gradients: per rank, gradients held.
        states: per rank, what the optimizer steps.
        cost: an optimizer's state of one piece.
        setup: dtypes, master copy.
        all_at_once: whether the temporaries of all tensors live together (torch's foreach step).
    """
    best: tuple[int, tuple[int, int, int, State]] | None = None
    known: dict[Piece, State] = {}
    itemsize = DTYPES[setup.dtype]
    for rank in range(max(len(parameters), len(gradients), len(states))):
        here = [side[rank if len(side) > 1 else 0] for side in (parameters, gradients, states)]
        weights, grads, stepped = (sum(piece.numel * n for piece, n in side.items()) for side in here)
        total, together = State(), 0
        for piece, count in here[2].items():
            if piece not in known:
                known[piece] = cost(piece)
            total = total.plus(known[piece], count)
            together += count * known[piece].temporary
        if all_at_once:
            total = State(total.exp_avg, total.exp_avg_sq, total.scales, total.step, together)
        master = stepped * FP32 if setup.master and setup.dtype != "fp32" else 0
        found = (weights * itemsize, grads * itemsize, master, total)
        size = sum(found[:3]) + total.total + total.temporary
        if best is None or size > best[0]:
            best = (size, found)
    assert best is not None  # every side has at least one rank
    return best[1]


def make_plan(parameters: Sequence[Parameter], setup: Setup, rules: Sequence[str] = DEFAULT_RULES) -> Plan:
    """The memory of every optimizer, on the rank where it needs the most.

    Args:
        parameters: of the model, in its order.
        setup: how it is trained.
        rules: rule sets of Adam-mini: shipped names or paths.

    Raises:
        ValueError, FileNotFoundError: rules that cannot be read; a ``tp`` that does not divide a parameter.
    """
    trainable = [p for p in parameters if p.trainable]
    weights = held(parameters, setup, sharded=setup.zero >= 3)
    gradients = held(trainable, setup, sharded=setup.zero >= 2)
    states = held(trainable, setup, sharded=setup.zero >= 1)
    elements = sum(p.numel for p in trainable)
    itemsize, kinds = DTYPES[setup.stepped_dtype], Counter(p.anatomy for p in trainable)

    def row(name: str, cost: Cost, n_blocks: int, *, all_at_once: bool = False) -> Row:
        return Row(name, *worst(weights, gradients, states, cost, setup, all_at_once=all_at_once), n_blocks)

    rows = [row(f"AdamW, {word} states", adamw(size), elements, all_at_once=True)
            for word, size in ((setup.stepped_dtype, itemsize), ("fp32", FP32))]  # fmt: skip
    rows.append(row("AdamW, 8-bit states", adamw_8bit(itemsize, flat=setup.flat), elements))
    for source in rules:
        loaded = Rules.load(source)
        layouts = {anatomy: layout_of(anatomy, loaded) for anatomy in kinds}
        blocks = sum(count * layouts[anatomy].n_blocks for anatomy, count in kinds.items())
        rows.append(row(f"Adam-mini, {loaded.name}", adam_mini(setup, layouts.__getitem__), blocks))
    unknown = tuple(p.name for p in parameters if not p.anatomy.recognised and len(p.anatomy.shape) >= 2)
    return Plan(setup, sum(p.numel for p in parameters), elements, tuple(rows), unknown, notes(setup))


def notes(setup: Setup) -> tuple[str, ...]:
    """What the numbers assume, in sentences."""
    out = [
        f"parameters and gradients in {setup.dtype}; "
        + (
            "an fp32 master copy, sharded as the state is"
            if setup.master
            else "no fp32 master copy (--master adds one)"
        ),
        "not counted: activations, layers gathered for a forward pass, communication buffers, allocator overhead",
        "AdamW's temporary is that of torch's default (foreach) step, which fused=True does without; the 8-bit step is "
        "taken as compiled, with none; Adam-mini's is an upper bound of this package's eager step (the native CPU step "
        "has none)",
        "8-bit: blockwise 256 with fp32 scales and code tables as torchao stores them; small tensors stay unquantised",
    ]
    if setup.exp_avg_dtype not in (None, setup.stepped_dtype):
        out.append(
            f"Adam-mini's exp_avg in {setup.exp_avg_dtype}: its storage, whether or not your optimizer offers it"
        )
    if setup.tp > 1:
        whole = "norms, biases, position tables and weights of unknown role"
        out.append(f"tensor parallelism cuts matrices by role; {whole} are whole on every rank")
    if setup.flat and setup.zero:
        how = "every parameter" if setup.zero == 3 else "one buffer of all parameters"
        out.append(f"ZeRO splits {how} by elements; where a range cuts columns, exp_avg_sq is an upper bound")
    return tuple(out)
