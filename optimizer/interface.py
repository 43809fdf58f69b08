"""Protocols that the rooms of ``optimizer`` share, and the registry of wrappers. This module imports none of the rooms.

``Stepper`` is the optimizer as other rooms use it: engines, sharding, conversion, memory and wrappers use these names
and nothing else of ``AdamMini``. ``Wrapper`` is a library that changes a model's parameters or an optimizer's groups:
FSDP1 flattens parameters, and DeepSpeed steps flat tensors of its own instead of the parameters. A wrapper is one file
in ``optimizer/wrappers`` and one line that registers it. Other rooms call all registered wrappers and import none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections import defaultdict

    import torch

    from .partition import Anatomy, Rules
    from .partition.factored import TensorLayout
    from .partition.layout import AnyLayout
    from .sharding.shard import Shard
    from .step.hyper import Hyper

Discover = Callable[[nn.Module], "dict[str, Anatomy]"]
"""Maps a model to the anatomy of each of its parameters, by name."""
AnatomyOf = Callable[[Tensor, str, "tuple[int, ...]"], "Anatomy"]
"""Maps a parameter, its name and its whole shape to its anatomy."""
LayoutOf = Callable[[Tensor], "TensorLayout | None"]
"""Maps a parameter to its layout, or to None if the optimizer was not built from it."""
Position = tuple[int, int]
"""A parameter's address (g, i): ``param_groups[g]["params"][i]``."""
Calls = list[tuple["Iterable[int] | None", "int | None"]]
"""The updates of one ``step()`` in order, each as (groups, parameter).

``groups`` are positions of groups, or None for all groups. ``parameter`` is the position of the only parameter to step
within the group, or None for all parameters of the groups.
"""


class Stepper(Protocol):
    """The optimizer as other rooms use it: its parameters, their layouts and state, and its steps.

    Positions ``(g, i)`` address ``param_groups[g]["params"][i]``. Code that reads groups, layouts or state as a whole
    first calls ``fix_layouts()`` and then works inside ``with optimizer.whole()``, because a library may leave only
    some of the parameters in the groups between steps.

    Attributes:
        param_groups: the parameter groups, as in ``torch.optim.Optimizer``.
        state: the state of every parameter that has one, as in ``torch.optim.Optimizer``.
        rules: which unit of each role shares a second-moment scalar.
        layouts: the layout of every parameter, as ``layouts[g][i]``.
        undecayed: names of the model's norms and biases, to which weight decay never applies.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    rules: Rules
    layouts: list[list[AnyLayout]]
    undecayed: frozenset[str]

    def fix_layouts(self) -> None:
        """Make ``layouts`` final. A subclass may postpone its choice of blocks until this call."""

    def numbers(self, group: dict[str, Any]) -> Hyper:
        """Return the group's hyper-parameters for this step."""

    def state_of(self, g: int, i: int) -> dict[str, Any]:
        """Return a parameter's state; create it if there is none."""

    def shard_of(self, g: int, i: int) -> Shard | None:
        """Return this rank's shard of a parameter, or None if the parameter is not sharded."""

    def step_parameter(self, g: int, i: int) -> None:
        """Step one parameter."""

    def step_all(self) -> None:
        """Step every parameter, outside a compiler's graph."""

    def skips(self) -> bool:
        """Return whether a GradScaler found infinite gradients, so that this step must be skipped."""

    def init_state(self) -> None:
        """Create the state of every parameter that has none."""

    def whole(self) -> AbstractContextManager[Calls]:
        """Return a context in which ``param_groups`` contain every parameter that has a layout.

        The context yields the updates that one ``step()`` consists of.
        """


class Stand(Protocol):
    """The tensors that a library steps instead of an optimizer's parameters. Their order never changes."""

    @property
    def layouts(self) -> list[list[AnyLayout]]:
        """The layout of each tensor, by group."""

    def whole(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Calls]:
        """Return a context in which the optimizer's groups contain all of the tensors.

        The context yields the updates that one ``step()`` consists of.
        """


class Wrapper:
    """A library that changes parameters or groups. A subclass overrides the methods that its library needs."""

    def whole_shapes(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the model's parameters have their original names and shapes.

        Original means before the library changed the model.
        """
        return nullcontext()

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Return the whole shape of a parameter that the library emptied, or None for any other parameter."""
        return None

    def saves_elements(self, parameter: Tensor) -> bool:
        """Return whether the library gathers and scatters the parameter's state element by element."""
        return False

    def describe_model(self, model: nn.Module, discover: Discover) -> None:
        """Attach to every flattened parameter a description of its elements (``optimizer.sharding.facts``)."""

    def describe_parameters(self, parameters: Sequence[tuple[Tensor, str]], anatomy_of: AnatomyOf) -> None:
        """Attach descriptions to flattened parameters without their model, from (parameter, name) pairs."""

    def stand_for(self, optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Stand | None:
        """Return the tensors that the library steps instead of the optimizer's parameters.

        The result is None if the library steps the parameters themselves.
        """
        return None

    def may_stand(self) -> bool:
        """Return whether ``stand_for`` can return anything in this process. It runs before every step: keep it fast."""
        return False


_WRAPPERS: list[Wrapper] = []


def register(wrapper: Wrapper) -> None:
    """Add a wrapper to those that the other rooms call."""
    _WRAPPERS.append(wrapper)


def wrappers() -> Sequence[Wrapper]:
    """Return the registered wrappers in the order of their registration."""
    return _WRAPPERS


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Open a context in which the model's parameters have the names and shapes from before any library changed them."""
    with ExitStack() as stack:
        for wrapper in _WRAPPERS:
            stack.enter_context(wrapper.whole_shapes(model))
        yield


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the whole shape of a parameter, even while a library keeps the parameter empty between uses."""
    for wrapper in _WRAPPERS:
        if (shape := wrapper.whole_shape(parameter)) is not None:
            return shape
    return tuple(parameter.shape)
