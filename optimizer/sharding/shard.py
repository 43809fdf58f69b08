"""One sharded parameter, and what of it engines take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..state.specification import new_state, state_bytes, zero_second_moment
from .cut_update import local_gradient
from .geometry import Box, Geometry
from .kinds import local_of


class Free:
    """A free part of a sharded parameter, as an engine takes it.

    Attributes:
        view: its elements of the parameter.
    """

    def __init__(self, part: Box, view: Tensor) -> None:
        self._part, self.view = part, view
        self._of: Mapping[str, Any] = {}
        self._state: dict[str, Any] = {}

    def forget(self) -> None:
        """The counter that was handed out is no longer right."""
        self._of = {}

    def gradient(self, grad: Tensor) -> Tensor:
        """Its elements of the parameter's gradient."""
        return self._part.of(grad)

    def state(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Its part of the parameter's local state, with a counter of its own; the same as long as the state is."""
        known = self._of
        if len(known) != len(whole) or any(known.get(name) is not x for name, x in whole.items()):
            self._of, self._state = dict(whole), {"step": whole["step"].clone()}
            for name in whole.keys() - {"step", "exp_avg_sq"}:
                self._state[name] = self._part.of(whole[name])
            self._state["exp_avg_sq"] = self._part.of_second(whole["exp_avg_sq"], tuple(self.view.shape))
        return self._state


class Shard:
    """A sharded parameter, and what was looked up about it.

    Attributes:
        parameter: the optimizer's.
        geometry: what is held of it here.
        view: what is held here as the engines take it, with a gradient of its own.
    """

    def __init__(self, parameter: Tensor, geometry: Geometry) -> None:
        self.parameter, self.geometry = parameter, geometry
        self.spec = getattr(parameter, "_spec", None)
        self._whole = geometry.cut is not None or not geometry.boxes or geometry.boxes[0].start is None
        self._held = local_of(parameter)
        self._at = self._held.data_ptr()
        self._states: dict[str, tuple[Tensor, Tensor]] = {}
        self._shown: tuple[list[int], list[Any], dict[str, Any]] = [], [], {}
        self._look()

    def _look(self) -> None:
        self.view = self._boxed(self._held.detach())
        self.free = [Free(part, part.of(self._held.detach())) for part in self.geometry.free]

    def fits(self, parameter: Tensor) -> bool:
        """Whether the parameter is still what it was."""
        return parameter is self.parameter and (
            self.spec is None or parameter._spec is self.spec  # type: ignore[attr-defined]
        )

    def refresh(self) -> None:
        """Follow the local tensor where it was put elsewhere."""
        held = self.parameter if self.spec is None else self.parameter._local_tensor  # type: ignore[attr-defined]
        if held.data_ptr() != self._at or (held is not self._held and self.spec is not None):
            self._held, self._at = held, held.data_ptr()
            self._look()

    def forget(self) -> None:
        """Parts' states are no longer what was handed out."""
        for free in self.free:
            free.forget()

    def _boxed(self, local: Tensor) -> Tensor:
        """As the one part of a geometry that an ordinary engine takes; otherwise as it is."""
        return local if self._whole else self.geometry.boxes[0].of(local)

    def local_gradient(self, where: Callable[[], str]) -> Tensor | None:
        """This rank's part of the gradient; ``where`` says the parameter in words, for errors."""
        grad = self.parameter.grad
        if self.spec is not None and grad is not None:  # placed alike, nearly always: told without asking more
            spec = getattr(grad, "_spec", None)
            if spec is not None and spec.placements == self.spec.placements:
                return grad._local_tensor  # type: ignore[attr-defined]
        return local_gradient(self.parameter, where)

    def gradient(self, grad: Tensor) -> Tensor:
        """The local gradient as the view is."""
        return grad if self._whole else self._boxed(grad)

    def local_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter's state as the engines take it; the same as long as the state has the same tensors."""
        same = list(map(id, state.values()))  # those shown are held, so that nothing else has their numbers
        if same != self._shown[0]:
            local = {name: self._local(name, x) if isinstance(x, Tensor) else x for name, x in state.items()}
            self._shown = same, list(state.values()), local
        return self._shown[2]

    def _local(self, name: str, tensor: Tensor) -> Tensor:
        known = self._states.get(name)
        if known is None or known[0] is not tensor:
            local = local_of(tensor)
            if name == "exp_avg_sq" and self.geometry.cut is None and self.geometry.boxes:
                local = self.geometry.boxes[0].of_second(local, tuple(self.view.shape))
            elif name != "step" and local.shape == self._held.shape:
                local = self._boxed(local)
            known = self._states[name] = tensor, local
        return known[1]

    def new_state(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """State before the first step: DTensors where the parameter is one."""
        second = zero_second_moment(self.view, self.geometry.aligned, self.view.device)
        return new_state(self.parameter, self.geometry.second_moment(second), group)

    def state_bytes(self, group: Mapping[str, Any]) -> dict[str, int]:
        """Bytes of this rank's state by kind."""
        return state_bytes(self.parameter, self.geometry.shape, self.geometry.aligned, group)
