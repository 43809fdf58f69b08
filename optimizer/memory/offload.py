"""Optimizer state on the host: parameters are on an accelerator, and AdamMini steps copies of them in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adam_mini import AdamMini
from ..step.labels import label
from .release import reduced_later, without_owning

_MARK = "_adam_mini_fetched"  # attribute of a gradient: its version when it was last copied to the host


@dataclass
class _Mirror:
    """A parameter's copy on the host.

    Attributes:
        host: the copy.
        g: position of the parameter's group.
        i: position of the parameter in the group.
        version: the parameter's version counter when the copy was last equal to it.
    """

    host: nn.Parameter
    g: int
    i: int
    version: int


class CPUOffload(torch.optim.Optimizer):
    """AdamMini with its state in host memory. Copies in both directions overlap with other work.

    A gradient is copied to pinned host memory on a side stream as soon as the backward pass has completed it. ``step``
    steps the host copy of each parameter with AdamMini's CPU engine, in the order in which the gradients arrive, and
    copies the new parameter back while the next one is stepped. The accelerator stores only parameters and gradients.

    It is used like AdamMini: groups and their options, schedulers, hooks, ``zero_grad``, and ``state_dict`` in
    AdamMini's format, so that either loads the other's checkpoints. Parameters that are changed in place elsewhere
    (loading a checkpoint, averaging) are detected by their version counter and copied again. Gradients that are changed
    after the backward pass (clipping, ``GradScaler``, all-reduce) are copied again as well. Changes through ``.data``
    are not detected. With several processes, gradients are copied in ``step``, after they are reduced.

    Args:
        params: a model, named parameters, parameters or group dicts, as for ``AdamMini``. A model must already be on
            its accelerator.
        lr: learning rate.
        offload_gradients: free a gradient on the accelerator once its copy to the host has started. Then only one
            backward pass per ``step`` is possible, without clipping and without a ``GradScaler``.
        **options: further arguments of ``AdamMini``.

    Raises:
        TypeError: ``params`` is an optimizer, or contains a DTensor (use FSDP2's ``CPUOffloadPolicy`` with AdamMini).
        ValueError: ``capturable=True`` or ``differentiable=True``, or any argument that AdamMini refuses.

    Example:
        >>> optimizer = CPUOffload(model.cuda(), lr=3e-4, weight_decay=0.1)
    """

    _step_supports_amp_scaling = True  # step() unscales on the host, and handles gradients unscaled in place

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        offload_gradients: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(params, torch.optim.Optimizer):
            raise TypeError(
                f"argument params is an optimizer ({type(params).__name__}); CPUOffload is one itself: pass "
                "the model or its parameters, and the hyper-parameters as arguments"
            )
        for name in ("capturable", "differentiable"):
            if options.get(name):
                raise ValueError(f"{name}=True needs the step on the accelerator; use AdamMini, or {name}=False")
        self.offload_gradients = offload_gradients
        self._mirrors: dict[Tensor, _Mirror] = {}
        self._fetched: dict[Tensor, Any] = {}  # parameter -> event of its gradient's copy, in order of arrival
        self._streams: dict[torch.device, Any] = {}
        # AdamMini finds the roles of the original parameters. Copies replace them before any state is created.
        self._host = AdamMini(params, lr, **options)
        super().__init__([dict(group) for group in self._host.param_groups], self._host.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``AdamMini``."""
        g = len(self.param_groups)
        if g == len(self._host.param_groups):  # in the constructor, the host optimizer already has the group
            self._host.add_param_group(param_group)
        group = dict(self._host.param_groups[g])
        if names := group.pop("param_names", None):
            group["params"] = list(zip(names, group["params"], strict=True))
        super().add_param_group({**group, "params": list(group["params"])})
        for i, parameter in enumerate(self.param_groups[g]["params"]):
            if parameter.requires_grad:
                self._mirror(parameter, g, i)

    def _mirror(self, parameter: Tensor, g: int, i: int) -> None:
        """Copy a parameter to the host, and replace it by the copy in the groups of the host optimizer."""
        where = label(self.param_groups[g], g, i)
        if hasattr(parameter, "placements"):
            raise TypeError(f"{where} is a DTensor; use AdamMini with fully_shard(offload_policy=CPUOffloadPolicy())")
        if g < len(self._host.param_groups) and i == len(self._host.param_groups[g]["params"]):
            self._host.param_groups[g]["params"].append(parameter)  # was appended to the group's list
            self._host.follow_edits()
        host_params = self._host.param_groups[g]["params"] if g < len(self._host.param_groups) else []
        if i >= len(host_params) or host_params[i] is not parameter:
            raise RuntimeError(f"{where} was replaced by another tensor; build CPUOffload after the replacement")
        copy = nn.Parameter(_buffer(parameter).copy_(parameter.detach()))
        host_params[i] = copy
        self._mirrors[parameter] = _Mirror(copy, g, i, parameter._version)
        parameter.register_post_accumulate_grad_hook(without_owning(self._receive))

    def _receive(self, parameter: Tensor) -> None:
        """Handle a completed gradient: start its copy to the host, unless it is still to be reduced over processes."""
        if parameter.grad is None or (not self.offload_gradients and reduced_later(parameter)):
            return
        if self.offload_gradients:
            mirror = self._mirrors[parameter]
            where = label(self.param_groups[mirror.g], mirror.g, mirror.i)
            if reduced_later(parameter):
                raise RuntimeError(
                    f"{where}: offload_gradients=True frees gradients before they are reduced over processes; use "
                    "offload_gradients=False"
                )
            if parameter in self._fetched:
                raise RuntimeError(
                    f"{where} got a second gradient since the last step(); gradient accumulation needs "
                    "offload_gradients=False"
                )
        self._fetch(parameter)
        if self.offload_gradients:
            parameter.grad = None

    @torch.no_grad()
    def _fetch(self, parameter: Tensor) -> None:
        """Start the copy of a gradient to the host, to run after the work that the accelerator has queued."""
        mirror, grad = self._mirrors[parameter], parameter.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            where = label(self.param_groups[mirror.g], mirror.g, mirror.i)
            raise RuntimeError(f"{where} has a sparse gradient; use a dense one (nn.Embedding(sparse=False))")
        module, stream = torch.get_device_module(grad.device), self._stream(grad.device)
        stream.wait_stream(module.current_stream(grad.device))
        with module.stream(stream):
            host_grad = mirror.host.grad
            if host_grad is None or host_grad.dtype != grad.dtype or host_grad.stride() != grad.stride():
                if grad.dtype != mirror.host.dtype:
                    mirror.host.grad_dtype = grad.dtype
                host_grad = mirror.host.grad = _buffer(grad)
            host_grad.copy_(grad, non_blocking=True)
            if grad.device.type != "cpu":
                grad.record_stream(stream)  # keep the allocator from reusing the memory before the copy has finished
        self._fetched.pop(parameter, None)
        self._fetched[parameter] = stream.record_event()
        setattr(grad, _MARK, grad._version)

    def _stream(self, device: torch.device) -> Any:
        """Return the side stream of a device; create it if there is none."""
        if device not in self._streams:
            module = torch.get_device_module(device)
            self._streams[device] = module.Stream() if device.type == "cpu" else module.Stream(device)
        return self._streams[device]

    # Copies and streams cannot be compiled. torch itself disables dynamo in this way, which does not import dynamo.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the host and copy the parameters back.

        Args:
            closure: recomputes the loss and returns it; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient cannot be stepped (parameters before it have been stepped), or a ``GradScaler`` is
                used with ``offload_gradients=True``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and self.offload_gradients:
            raise RuntimeError("a GradScaler cannot check gradients that have been freed; use offload_gradients=False")
        if found_inf is not None and bool(found_inf):
            return loss
        self._host.grad_scale = None if scale is None else scale.cpu()  # type: ignore[attr-defined]
        self._share_numbers()
        # GradScaler.unscale_ changes gradients in place without a change of their version counters.
        self._fetch_missing(unscaled=found_inf is not None and scale is None)
        for device, stream in self._streams.items():
            stream.wait_stream(torch.get_device_module(device).current_stream(device))
        for parameter, event in self._fetched.items():
            self._update(parameter, event)
        for device, stream in self._streams.items():
            torch.get_device_module(device).current_stream(device).wait_stream(stream)
        self._fetched.clear()
        return loss

    def _fetch_missing(self, *, unscaled: bool) -> None:
        """Copy gradients whose current values were not copied by a hook, and discard copies of cleared gradients.

        Args:
            unscaled: whether a GradScaler may have changed gradients in place, so that all of them are copied again.
        """
        self._require_positions()
        for g, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is None:
                    if not self.offload_gradients:
                        self._fetched.pop(parameter, None)
                    continue
                if parameter not in self._mirrors:
                    self._mirror(parameter, g, i)
                if unscaled or parameter not in self._fetched or getattr(grad, _MARK, None) != grad._version:
                    self._fetch(parameter)

    def _require_positions(self) -> None:
        """Raise RuntimeError if a parameter left its position in the groups: its copy would still be stepped."""
        positions = {p: (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        for parameter, mirror in self._mirrors.items():
            if positions.get(parameter) != (mirror.g, mirror.i):
                where = label(self._host.param_groups[mirror.g], mirror.g, mirror.i)
                raise RuntimeError(
                    f"{where} was taken out of its place in param_groups; CPUOffload supports only additions to the "
                    "groups: build it anew"
                )

    def _update(self, parameter: Tensor, event: Any) -> None:
        """Step one host copy once its gradient has arrived, and start to copy it back."""
        mirror = self._mirrors[parameter]
        if event is not None:  # streams of a CPU have no events
            event.synchronize()
        if parameter._version != mirror.version:
            mirror.host.copy_(parameter)
        self._host.step_parameter(mirror.g, mirror.i)
        self.state[parameter] = self._host.state[mirror.host]
        with torch.get_device_module(parameter.device).stream(self._stream(parameter.device)):
            parameter.copy_(mirror.host, non_blocking=True)
        mirror.version = parameter._version

    def _share_numbers(self) -> None:
        """Copy the options of the groups to the groups of the host optimizer."""
        for group, host_group in zip(self.param_groups, self._host.param_groups, strict=True):
            host_group.update({name: value for name, value in group.items() if name != "params"})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, including those that are being copied to the host."""
        super().zero_grad(set_to_none)
        self._fetched.clear()

    def init_state(self) -> None:
        """Create all state now, as zeros, so that its memory is allocated before the first step."""
        self._host.init_state()
        self._link_state()

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of state in host memory by kind, without the copies of parameters and gradients."""
        return self._host.state_bytes()

    def _link_state(self) -> None:
        """Set ``state`` to the states of the host copies, by parameter."""
        self.state.clear()
        self.state.update({p: self._host.state[m.host] for p, m in self._mirrors.items() if m.host in self._host.state})

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of AdamMini."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._share_numbers()
        document = self._host.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            document = _or(after(self, document), document)
        return document

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load state as ``AdamMini.load_state_dict`` does; parameters come from the model."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or(before(self, state_dict), state_dict)
        self._host.load_state_dict(state_dict, convert=convert)
        for group, host_group in zip(self.param_groups, self._host.param_groups, strict=True):
            group.update({name: value for name, value in host_group.items() if name != "params"})
        self._link_state()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("CPUOffload has hooks on its parameters, so it cannot be copied or pickled; save state_dict()")


def _or(new: Any, old: Any) -> Any:
    """Return a hook's result, or the previous value if the hook returned None."""
    return old if new is None else new


def _buffer(like: Tensor) -> Tensor:
    """Return uninitialised host memory for a copy, pinned if an accelerator reads or writes it."""
    return torch.empty_like(like, device="cpu", pin_memory=like.device.type != "cpu", requires_grad=False)
