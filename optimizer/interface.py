"""What rooms of the optimizer exchange: protocols, and the list of wrappers. This module imports none of the rooms.

``Stepper`` is the optimizer as everything below and above its class sees it: engines, sharding, conversion, memory and
wrappers use these names and nothing else of ``AdamMini``. ``Wrapper`` is a library that changes a model's parameters
or an optimizer's groups (FSDP1 flattens parameters, DeepSpeed steps flat tensors in their place). A wrapper is one file
in ``optimizer/wrappers`` and one line that registers it; the rooms below ask all registered wrappers and know none.
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
    from .partition.layout import AnyLayout, Layout
    from .sharding.shard import Shard
    from .step.hyper import Hyper

Discover = Callable[[nn.Module], "dict[str, Anatomy]"]
AnatomyOf = Callable[[Tensor, str, "tuple[int, ...]"], "Anatomy"]
LayoutOf = Callable[[Tensor], "Layout | None"]
Position = tuple[int, int]
"""A parameter: its group, and its place within the group."""
Calls = list[tuple["Iterable[int] | None", "int | None"]]
"""What one ``step()`` takes, in order: positions of groups (None: all), and of the one parameter if it is not all."""


class Stepper(Protocol):
    """An optimizer that steps blocks, as other rooms use it.

    Attributes:
        param_groups, state: as in ``torch.optim.Optimizer``.
        rules: what shares a scalar.
        layouts: the blocks of every parameter, by group position and position within the group.
        undecayed: names of a model's norms and biases, which never decay.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    rules: Rules
    layouts: list[list[AnyLayout]]
    undecayed: frozenset[str]

    def fix_layouts(self) -> None:
        """Make ``layouts`` final. A subclass may decide on blocks as late as this."""

    def numbers(self, group: dict[str, Any]) -> Hyper:
        """The group's numbers for this step."""

    def state_of(self, g: int, i: int) -> dict[str, Any]:
        """A parameter's state, made if there is none."""

    def shard_of(self, g: int, i: int) -> Shard | None:
        """What this rank holds of a parameter; None for an ordinary one."""

    def step_parameter(self, g: int, i: int) -> None:
        """Take the step of one parameter."""

    def step_all(self) -> None:
        """Take the step of every parameter, outside a compiler's graph."""

    def skips(self) -> bool:
        """Whether a GradScaler found that this step must not happen."""

    def init_state(self) -> None:
        """Make all state that is missing."""

    def whole(self) -> AbstractContextManager[Calls]:
        """While this is open, ``param_groups`` hold every parameter that has a layout; gives what a step takes."""


class Stand(Protocol):
    """Tensors that a library steps in place of an optimizer's parameters; their order never changes."""

    @property
    def layouts(self) -> list[list[AnyLayout]]:
        """By group position."""

    def whole(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Calls]:
        """While this is open, the optimizer's groups hold all of the tensors; gives what a step takes."""


class Wrapper:
    """A library that changes parameters or groups; a subclass overrides what its library does."""

    def whole_shapes(self, model: nn.Module) -> AbstractContextManager[None]:
        """While this is open, the model's parameters have the names and shapes they had before the library came."""
        return nullcontext()

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The shape of all of a parameter that the library emptied; None for any other."""
        return None

    def saves_elements(self, parameter: Tensor) -> bool:
        """Whether the library gathers and deals out the parameter's state element by element."""
        return False

    def describe_model(self, model: nn.Module, discover: Discover) -> None:
        """Leave on every flattened parameter what it holds (``sharding.facts``)."""

    def describe_parameters(self, parameters: Sequence[tuple[Tensor, str]], anatomy_of: AnatomyOf) -> None:
        """The same for (parameter, name) pairs whose model is not at hand."""

    def stand_for(self, optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Stand | None:
        """What the library steps in place of the optimizer's parameters; None where it steps the parameters."""
        return None

    def may_stand(self) -> bool:
        """Whether ``stand_for`` can find anything in this process; asked before every step, so it must be quick."""
        return False


_WRAPPERS: list[Wrapper] = []


def register(wrapper: Wrapper) -> None:
    """Let the rooms below ask this wrapper, too."""
    _WRAPPERS.append(wrapper)


def wrappers() -> Sequence[Wrapper]:
    """The registered wrappers, in order."""
    return _WRAPPERS


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """While this is open, the model's parameters have the names and shapes they had before any library came."""
    with ExitStack() as stack:
        for wrapper in _WRAPPERS:
            stack.enter_context(wrapper.whole_shapes(model))
        yield


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of all of a parameter, also where a library has emptied it until it is used."""
    for wrapper in _WRAPPERS:
        if (shape := wrapper.whole_shape(parameter)) is not None:
            return shape
    return tuple(parameter.shape)
