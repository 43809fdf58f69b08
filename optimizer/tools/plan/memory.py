"""The accounting: bytes per rank of parameters, gradients, optimizer state by kind, and a step's temporaries.

``holdings`` says what a rank holds, ``states`` what a tensor costs. ``notes`` says what is assumed, and is printed with
every table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from ...partition import Layout, Rules, layout_of
from ...step.moments import FORMATS
from .holdings import Holding, Tensor, elements, stepped
from .sharding import DTYPES, Parameter, Setup
from .states import FP32, Cost, State, adam_mini, adamw, adamw_8bit

DEFAULT_RULES = ("adam_mini", "short_run", "pytorch_default", "slim_adam", "derived")


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


def worst(ranks: Iterable[Holding], cost: Cost, *, all_at_once: bool = False) -> tuple[int, State]:
    """(elements stepped, state) of the rank whose state and temporaries need the most.

    Args:
        ranks: what each of them steps.
        cost: an optimizer's state of one tensor.
        all_at_once: whether the temporaries of all tensors live together (torch's foreach step).
    """
    best: tuple[int, State] | None = None
    known: dict[Tensor, State] = {}
    for holding in ranks:
        total, together = State(), 0
        for tensor, count in holding.items():
            if tensor not in known:
                known[tensor] = cost(tensor)
            total = total.plus(known[tensor], count)
            together += count * known[tensor].temporary
        if all_at_once:
            total = replace(total, temporary=together)
        if best is None or total.total + total.temporary > best[1].total + best[1].temporary:
            best = sum(count * prod(tensor.shape) for tensor, count in holding.items()), total
    return best or (0, State())


def make_plan(parameters: Sequence[Parameter], setup: Setup, rules: Sequence[str] = DEFAULT_RULES) -> Plan:
    """The memory of every optimizer, on the rank where it needs the most.

    Args:
        parameters: of the model, in its order.
        setup: how it is trained.
        rules: rule sets of Adam-mini: shipped names or paths.

    Raises:
        ValueError, FileNotFoundError: rules that cannot be read, or whose overrides match no parameter; a ``tp`` that
            does not divide a parameter.
    """
    trainable = [p for p in parameters if p.trainable]
    itemsize = DTYPES[setup.dtype]
    weights = itemsize * elements(parameters, setup, sharded=setup.zero >= 3)
    gradients = itemsize * elements(trainable, setup, sharded=setup.zero >= 2)
    numel, masters = sum(p.numel for p in trainable), setup.master and setup.dtype != "fp32"

    def row(name: str, cost: Cost, layouts: Sequence[Layout], blocks: int, *, all_at_once: bool = False) -> Row:
        own, state = worst(stepped(trainable, layouts, setup), cost, all_at_once=all_at_once)
        return Row(name, weights, gradients, FP32 * own if masters else 0, state, blocks)

    itemsize, anything = DTYPES[setup.stepped_dtype], [Layout.per_tensor(p.anatomy.shape) for p in trainable]
    rows = [row(f"AdamW, {word} states", adamw(size), anything, numel, all_at_once=True)
            for word, size in ((setup.stepped_dtype, itemsize), ("fp32", FP32))]  # fmt: skip
    rows.append(row("AdamW, 8-bit states", adamw_8bit(itemsize, flat=setup.flat), anything, numel))
    for source in rules:
        loaded = Rules.load(source)
        loaded.require_matches([p.name for p in parameters])
        layouts = [layout_of(p.anatomy, loaded, p.name) for p in trainable]
        blocks = sum(layout.n_blocks for layout in layouts)
        rows.append(row(f"Adam-mini, {loaded.name}", adam_mini(setup), layouts, blocks))
    unknown = tuple(p.name for p in parameters if not p.anatomy.recognised and len(p.anatomy.shape) >= 2)
    return Plan(setup, sum(p.numel for p in parameters), numel, tuple(rows), unknown, notes(setup))


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
        "AdamW's 8 bits: blocks of 256 with fp32 scales and code tables as torchao stores them; small tensors stay "
        "unquantised",
    ]
    if (kept := FORMATS.get(setup.exp_avg_dtype or "")) is not None:
        out.append(
            f"Adam-mini's exp_avg in {kept.name}: blocks of {kept.block} along a row, each with a scale; small tensors "
            "and short rows stay unquantised"
        )
    if setup.tp > 1:
        whole = "norms, biases, position tables and weights of unknown role"
        out.append(f"tensor parallelism cuts matrices by role; {whole} are whole on every rank")
    if setup.flat and setup.zero:
        how = "every parameter" if setup.zero == 3 else "one buffer of a group's parameters"
        out.append(f"ZeRO splits {how} by elements, in equal parts with padding")
    return tuple(out)
