"""One sharded parameter, and the views of it that engines step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..state.specification import new_state, state_bytes, zero_second_moment
from ..step.dtypes import moment_format
from ..step.moments import FORMATS
from ..step.places import Place
from . import placed_moments
from .cut_update import local_gradient
from .flat_moments import FlatMoment
from .geometry import Box, Geometry
from .kinds import local_of


class FreeBox:
    """A free box of a sharded parameter, with the tensors that an engine needs to step it.

    Attributes:
        view: the parameter's elements in the box.
        place: where they lie in the whole tensor.
    """

    def __init__(self, box: Box, view: Tensor, place: Place | None, flat: FlatMoment | None = None) -> None:
        self._box, self.view, self.place, self._flat = box, view, place, flat
        self._source: Mapping[str, Any] = {}
        self._state: dict[str, Any] = {}

    def forget(self) -> None:
        """Discard the cached state, because its copy of the step counter is out of date."""
        self._source = {}

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient's elements in the box."""
        return self._box.of(grad)

    def state(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Return the box's views of the parameter's local state, with a step counter of its own.

        The result is the same dictionary as long as the state has the same tensors.
        """
        source = self._source
        if len(source) != len(whole) or any(source.get(name) is not x for name, x in whole.items()):
            self._source, self._state = dict(whole), {"step": whole["step"].clone()}
            others = {"step", "exp_avg_sq", "exp_avg_sq_col"}
            if self._flat is not None and "exp_avg_scale" in whole:
                others |= {"exp_avg", "exp_avg_scale"}
            for name in whole.keys() - others:
                self._state[name] = self._box.of(whole[name])
            if self._flat is not None and "exp_avg_scale" in whole:
                self._state |= self._flat.box_state(self._box, whole["exp_avg"], whole["exp_avg_scale"])
            self._state["exp_avg_sq"] = self._box.of_second(whole["exp_avg_sq"], tuple(self.view.shape))
            if self._box.columns is not None:
                self._state["exp_avg_sq_col"] = self._box.of_columns(whole["exp_avg_sq_col"])
        return self._state


class Shard:
    """A sharded parameter, its geometry, and cached views of its local tensors.

    Attributes:
        parameter: the parameter in the optimizer's groups.
        geometry: the boxes and blocks of this rank's shard.
        spec: the DTensor specification of the parameter; None for plain tensors.
        view: the local tensor that engines step. It shares the parameter's storage and has its own ``grad``.
        free: the free boxes, which engines step as tensors of their own.
        place: where the local tensor lies in the whole one, for the random numbers of rounding.
        flat: the first moment of a flat parameter; None for a DTensor.
        by_element: whether its placements divide the rows that share scales of a quantised first moment. State dicts
            then have that moment by element (``moment_forms``), also if there is one rank.
    """

    def __init__(self, parameter: Tensor, geometry: Geometry, flat: FlatMoment | None = None) -> None:
        self.parameter, self.geometry, self.flat = parameter, geometry, flat
        self.spec = getattr(parameter, "_spec", None)
        placed, shape = geometry.placed, tuple(parameter.shape)
        self.place = None if placed is None else placed_moments.place_of(shape, placed.held)
        if flat is not None and geometry.boxes:
            self.place = replace(flat.place(geometry.boxes[0]), shape=flat.whole)
        dims = [getattr(placement, "dim", -1) for placement in getattr(parameter, "placements", ())]
        self.by_element = flat is not None or placed_moments.cuts_rows(shape, dims)
        # Whether ``view`` is the whole local tensor, and not only the single box that an engine can step.
        self._whole = geometry.cut is not None or not geometry.boxes or geometry.boxes[0].start is None
        self._local_data = local_of(parameter)
        self._address = self._local_data.data_ptr()
        self._states: dict[str, tuple[Tensor, Tensor]] = {}
        self._cached: tuple[list[int], list[Any], dict[str, Any]] = [], [], {}  # ids and values of a state, local state
        self._make_views()

    def _make_views(self) -> None:
        self.view = self._boxed(self._local_data.detach())
        local = self._local_data.detach()
        self.free = [FreeBox(box, box.of(local), self._place_of(box), self.flat) for box in self.geometry.free]

    def _place_of(self, box: Box) -> Place | None:
        """Return the place of a free box, which is a slice of axis 0 of the local tensor."""
        if self.flat is not None:
            return self.flat.place(box)
        return None if self.place is None else placed_moments.moved(self.place, self.geometry.shape, box.start or 0)

    def fits(self, parameter: Tensor) -> bool:
        """Return whether this shard still describes the parameter: same tensor, same DTensor specification."""
        return parameter is self.parameter and (
            self.spec is None or parameter._spec is self.spec  # type: ignore[attr-defined]
        )

    def stores(self, group: Mapping[str, Any]) -> bool:
        """Return whether the first moment of a flat parameter has the form that the group asks for."""
        name = group["exp_avg_dtype"]
        return self.flat is None or self.flat.requested is (FORMATS[name] if isinstance(name, str) else None)

    def refresh(self) -> None:
        """Make the views anew if the local tensor was replaced or its storage has moved."""
        local = self.parameter if self.spec is None else self.parameter._local_tensor  # type: ignore[attr-defined]
        if local.data_ptr() != self._address or (local is not self._local_data and self.spec is not None):
            self._local_data, self._address = local, local.data_ptr()
            self._make_views()

    def forget(self) -> None:
        """Discard the cached states of free boxes, because their step counters are out of date."""
        for free in self.free:
            free.forget()

    def _boxed(self, local: Tensor) -> Tensor:
        """Return the part of a local tensor that ``view`` shows: all of it, or the single box that an engine steps."""
        return local if self._whole else self.geometry.boxes[0].of(local)

    def local_gradient(self, where: Callable[[], str]) -> Tensor | None:
        """Return this rank's shard of the gradient; None if there is no gradient.

        Args:
            where: returns a description of the parameter for error messages.

        Raises:
            RuntimeError: only one of parameter and gradient is a DTensor.
        """
        grad = self.parameter.grad
        if self.spec is not None and grad is not None:  # equal placements are the common case; test them first
            spec = getattr(grad, "_spec", None)
            if spec is not None and spec.placements == self.spec.placements:
                return grad._local_tensor  # type: ignore[attr-defined]
        return local_gradient(self.parameter, where)

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the local gradient as a tensor of the same shape as ``view``."""
        return grad if self._whole else self._boxed(grad)

    def local_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameter's state with local tensors, as engines need it.

        The result is the same dictionary as long as the state has the same tensors.
        """
        ids = list(map(id, state.values()))  # the cache keeps these tensors alive, so that their ids stay unique
        if ids != self._cached[0]:
            local = {name: self._local(name, x) if isinstance(x, Tensor) else x for name, x in state.items()}
            self._cached = ids, list(state.values()), local
        return self._cached[2]

    def _local(self, name: str, tensor: Tensor) -> Tensor:
        """Return the local tensor of one entry of the state, in the shape that goes with ``view``."""
        cached = self._states.get(name)
        if cached is None or cached[0] is not tensor:
            local = local_of(tensor)
            if name == "exp_avg_sq" and self.geometry.cut is None and self.geometry.boxes:
                local = self.geometry.boxes[0].of_second(local, tuple(self.view.shape))
            elif name not in ("step", "exp_avg_sq_col") and local.shape == self._local_data.shape:
                local = self._boxed(local)
            cached = self._states[name] = tensor, local
        return cached[1]

    def new_state(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state before the first step, with DTensors if the parameter is one."""
        geometry, device = self.geometry, self.view.device
        second = geometry.second_moment(zero_second_moment(self.view, geometry.aligned, device))
        quantised, format = None, moment_format(self.parameter, group)
        if self.flat is not None and self.flat.format is not None:
            quantised = self.flat.zeros(device)
        elif format is not None:
            quantised = placed_moments.zeros(self.parameter, format)  # type: ignore[arg-type]
        columns = None
        if geometry.columns is not None:
            zeros = zero_second_moment(self.view, geometry.columns.shape, device)
            columns = geometry.columns.second_moment(zeros)
        return new_state(self.parameter, second, group, columns, quantised)

    def state_bytes(self, group: Mapping[str, Any]) -> dict[str, int]:
        """Return the bytes of this rank's state, by kind."""
        columns = None if self.geometry.columns is None else self.geometry.columns.shape
        count = state_bytes(self.parameter, self.geometry.shape, self.geometry.aligned, group, columns)
        if self.flat is not None and self.flat.format is not None:
            count["exp_avg"] = self.flat.nbytes
        return count
