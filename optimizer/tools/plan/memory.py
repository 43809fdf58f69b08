"""Add up the bytes per rank of parameters, gradients, optimizer state, and temporary allocations of a step.

``holdings`` computes the tensors of each rank, and ``states`` the bytes of a tensor. ``notes`` returns the assumptions,
which are printed with every table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from ...partition import Layout, Rules, TensorLayout, layout_of
from ...step.moments import FORMATS
from .holdings import Holding, Tensor, elements, stepped
from .sharding import DTYPES, Parameter, Setup
from .states import FP32, Cost, State, adam_mini, adamw, adamw_8bit

DEFAULT_RULES = ("adam_mini", "short_run", "pytorch_default", "slim_adam", "derived_blocks", "derived", "factored")


@dataclass(frozen=True)
class Row:
    """Memory of one optimizer on the rank where it needs the most.

    Attributes:
        optimizer: name of the optimizer.
        parameters: bytes of the parameters.
        gradients: bytes of the gradients.
        master: bytes of the fp32 master copy.
        state: bytes of the optimizer state.
        n_blocks: number of second-moment scalars of the whole model.
    """

    optimizer: str
    parameters: int
    gradients: int
    master: int
    state: State
    n_blocks: int

    @property
    def resident(self) -> int:
        """Bytes between the backward pass and the step: parameters, gradients, master copy, optimizer state."""
        return self.parameters + self.gradients + self.master + self.state.total

    @property
    def peak(self) -> int:
        """Bytes during the step."""
        return self.resident + self.state.temporary


@dataclass(frozen=True)
class Plan:
    """Memory of every optimizer under one setup.

    Attributes:
        setup: parallelism and dtypes of the training run.
        elements: number of elements of the whole model.
        trainable: number of trainable elements.
        rows: one row per optimizer. The first two are AdamW with states in the parameters' dtype and in fp32.
        unrecognised: names of the weights of two or more dimensions whose role is OTHER.
        notes: assumptions, in sentences.
    """

    setup: Setup
    elements: int
    trainable: int
    rows: tuple[Row, ...]
    unrecognised: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def row(self, optimizer: str) -> Row:
        """Return the row of an optimizer by its name."""
        return next(row for row in self.rows if row.optimizer == optimizer)


def worst(ranks: Iterable[Holding], cost: Cost, *, all_at_once: bool = False) -> tuple[int, State]:
    """Return (elements stepped, state) of the rank whose state and temporaries need the most memory.

    Args:
        ranks: tensors that the optimizer of each rank steps.
        cost: function that returns the optimizer's state of one tensor.
        all_at_once: whether the temporaries of all tensors exist at the same time, as in torch's foreach step.
    """
    best: tuple[int, State] | None = None
    states: dict[Tensor, State] = {}
    for holding in ranks:
        total, temporaries = State(), 0
        for tensor, count in holding.items():
            if tensor not in states:
                states[tensor] = cost(tensor)
            total = total.plus(states[tensor], count)
            temporaries += count * states[tensor].temporary
        if all_at_once:
            total = replace(total, temporary=temporaries)
        if best is None or total.total + total.temporary > best[1].total + best[1].temporary:
            best = sum(count * prod(tensor.shape) for tensor, count in holding.items()), total
    return best or (0, State())


def make_plan(parameters: Sequence[Parameter], setup: Setup, rules: Sequence[str] = DEFAULT_RULES) -> Plan:
    """Compute the memory of every optimizer on the rank where it needs the most.

    Args:
        parameters: parameters of the model, in the model's order.
        setup: parallelism and dtypes of the training run.
        rules: rule sets of Adam-mini: names of shipped sets or paths of rules files.

    Raises:
        ValueError: rules are invalid, an override of the rules matches no parameter, or ``setup.tp`` does not divide
            the units of a parameter.
        FileNotFoundError: a rules file does not exist.
    """
    trainable = [p for p in parameters if p.trainable]
    itemsize = DTYPES[setup.dtype]
    weights = itemsize * elements(parameters, setup, sharded=setup.zero >= 3)
    gradients = itemsize * elements(trainable, setup, sharded=setup.zero >= 2)
    numel, has_master = sum(p.numel for p in trainable), setup.master and setup.dtype != "fp32"

    def row(name: str, cost: Cost, layouts: Sequence[TensorLayout], blocks: int, *, all_at_once: bool = False) -> Row:
        stepped_elements, state = worst(stepped(trainable, layouts, setup), cost, all_at_once=all_at_once)
        return Row(name, weights, gradients, FP32 * stepped_elements if has_master else 0, state, blocks)

    itemsize, any_layouts = DTYPES[setup.stepped_dtype], [Layout.per_tensor(p.anatomy.shape) for p in trainable]
    rows = [
        row(f"AdamW, {dtype} states", adamw(size), any_layouts, numel, all_at_once=True)
        for dtype, size in ((setup.stepped_dtype, itemsize), ("fp32", FP32))
    ]
    rows.append(row("AdamW, 8-bit states", adamw_8bit(itemsize, flat=setup.flat), any_layouts, numel))
    for source in rules:
        loaded = Rules.load(source)
        loaded.require_matches([p.name for p in parameters])
        layouts = [layout_of(p.anatomy, loaded, p.name) for p in trainable]
        blocks = sum(layout.n_blocks for layout in layouts)
        rows.append(row(f"Adam-mini, {loaded.name}", adam_mini(setup), layouts, blocks))
    unrecognised = tuple(p.name for p in parameters if not p.anatomy.recognised and len(p.anatomy.shape) >= 2)
    return Plan(setup, sum(p.numel for p in parameters), numel, tuple(rows), unrecognised, notes(setup))


def notes(setup: Setup) -> tuple[str, ...]:
    """Return the assumptions behind the numbers, in sentences."""
    out = [
        f"parameters and gradients in {setup.dtype}; "
        + (
            "an fp32 master copy, sharded like the state" if setup.master else "no fp32 master copy (--master adds one)"
        ),
        "not counted: activations, layers gathered for a forward pass, communication buffers, allocator overhead",
        "AdamW's temporary is that of torch's default (foreach) step, and a step with fused=True needs none; the 8-bit "
        "step is assumed to be compiled and to need none; Adam-mini's is an upper bound of this package's eager step "
        "(the native CPU step needs none)",
        "AdamW's 8 bits: blocks of 256 with fp32 scales and code tables as torchao stores them; small tensors stay "
        "unquantised",
    ]
    if (fmt := FORMATS.get(setup.exp_avg_dtype or "")) is not None:
        out.append(
            f"Adam-mini's exp_avg in {fmt.name}: blocks of {fmt.block} along a row, each with a scale; small tensors "
            "and short rows stay unquantised"
        )
    if setup.tp > 1:
        whole = "norms, biases, position tables and weights of unknown role"
        out.append(f"tensor parallelism cuts matrices by role; {whole} are whole on every rank")
    if setup.flat and setup.zero:
        how = "every parameter" if setup.zero == 3 else "one buffer of a group's parameters"
        out.append(f"ZeRO splits {how} by elements, in equal parts with padding")
    return tuple(out)
