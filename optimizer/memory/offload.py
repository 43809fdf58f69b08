"""State on the host: parameters train on an accelerator, AdamMini steps copies of them in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adam_mini import AdamMini
from ..step.labels import label
from .release import reduced_later, without_owning

_MARK = "_adam_mini_fetched"


@dataclass
class _Mirror:
    """A parameter's copy on the host; ``version`` is the parameter's when both were equal last."""

    host: nn.Parameter
    g: int
    i: int
    version: int


class CPUOffload(torch.optim.Optimizer):
    """AdamMini whose state lives in host memory, with copies in both directions hidden behind other work.

    A gradient is copied to pinned host memory on a side stream as soon as the backward pass has finished it; ``step``
    steps the host's copy of each parameter in the order their gradients arrive, by AdamMini's CPU engine, and sends
    the new parameter back while the next one steps. The accelerator holds parameters and gradients and nothing else.

    To its callers it is an optimizer like AdamMini: groups and their numbers, schedulers, hooks, ``zero_grad``, and
    ``state_dict`` in AdamMini's format, so that checkpoints load from one into the other. Parameters that are changed
    in place elsewhere (loading a checkpoint, averaging) are noticed by their version counter and copied again.
    Gradients that are changed after the backward pass (clipping, ``GradScaler``, all-reduce) are copied again as well;
    only changes through ``.data`` go unseen. With several processes gradients are fetched in ``step``, once reduced.

    Args:
        params: as for ``AdamMini``; the model must be on its accelerator already.
        lr: learning rate.
        offload_gradients: free a gradient on the accelerator once it is on its way to the host. One backward pass per
            ``step`` then, and no clipping, no ``GradScaler``.
        **options: as for ``AdamMini``.

    Raises:
        TypeError: an optimizer instead of parameters; a DTensor (use FSDP2's ``CPUOffloadPolicy`` with AdamMini).
        ValueError: ``capturable=True`` or ``differentiable=True``; anything AdamMini refuses.

    Example:
        >>> optimizer = CPUOffload(model.cuda(), lr=3e-4, weight_decay=0.1)
    """

    _step_supports_amp_scaling = True  # unscales on the host, and learns of gradients that were unscaled in place

    def __init__(
        self, params: nn.Module | Iterable[Any], lr: float | Tensor = 1e-3, *, offload_gradients: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        if isinstance(params, torch.optim.Optimizer):
            raise TypeError(
                f"argument params is an optimizer ({type(params).__name__}); CPUOffload is one itself: give it the "
                "model or its parameters, and the numbers as arguments"
            )
        for name in ("capturable", "differentiable"):
            if options.get(name):
                raise ValueError(f"{name}=True needs the step on the accelerator; use AdamMini, or {name}=False")
        self.offload_gradients = offload_gradients
        self._mirrors: dict[Tensor, _Mirror] = {}
        self._fetched: dict[Tensor, Any] = {}  # parameter -> event of its gradient's copy, in order of arrival
        self._streams: dict[torch.device, Any] = {}
        # Recognises the parameters as they are; copies take their places before any state is made.
        self._host = AdamMini(params, lr, **options)
        super().__init__([dict(group) for group in self._host.param_groups], self._host.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``AdamMini``."""
        g = len(self.param_groups)
        if g == len(self._host.param_groups):  # while the constructor runs, the host is ahead
            self._host.add_param_group(param_group)
        group = dict(self._host.param_groups[g])
        if names := group.pop("param_names", None):
            group["params"] = list(zip(names, group["params"], strict=True))
        super().add_param_group({**group, "params": list(group["params"])})
        for i, parameter in enumerate(self.param_groups[g]["params"]):
            if parameter.requires_grad:
                self._mirror(parameter, g, i)

    def _mirror(self, parameter: Tensor, g: int, i: int) -> None:
        """Copy a parameter to the host, where the copy takes its place."""
        where = label(self.param_groups[g], g, i)
        if hasattr(parameter, "placements"):
            raise TypeError(f"{where} is a DTensor; use AdamMini with fully_shard(offload_policy=CPUOffloadPolicy())")
        if g < len(self._host.param_groups) and i == len(self._host.param_groups[g]["params"]):
            self._host.param_groups[g]["params"].append(parameter)  # appended by hand: the host recognises it now
            self._host.follow_edits()
        mine = self._host.param_groups[g]["params"] if g < len(self._host.param_groups) else []
        if i >= len(mine) or mine[i] is not parameter:
            raise RuntimeError(f"{where} was replaced by another tensor; build CPUOffload after the replacement")
        copy = nn.Parameter(_buffer(parameter).copy_(parameter.detach()))
        mine[i] = copy
        self._mirrors[parameter] = _Mirror(copy, g, i, parameter._version)
        parameter.register_post_accumulate_grad_hook(without_owning(self._receive))

    def _receive(self, parameter: Tensor) -> None:
        """A gradient is whole: send it off."""
        if parameter.grad is None or (not self.offload_gradients and reduced_later(parameter)):
            return
        if self.offload_gradients:
            mirror = self._mirrors[parameter]
            where = label(self.param_groups[mirror.g], mirror.g, mirror.i)
            if reduced_later(parameter):
                raise RuntimeError(f"{where}: offload_gradients=True sends gradients off before they are reduced over "
                                   "processes; use offload_gradients=False")  # fmt: skip
            if parameter in self._fetched:
                raise RuntimeError(f"{where} got a second gradient since the last step(); gradient accumulation needs "
                                   "offload_gradients=False")  # fmt: skip
        self._fetch(parameter)
        if self.offload_gradients:
            parameter.grad = None

    @torch.no_grad()
    def _fetch(self, parameter: Tensor) -> None:
        """Start the copy of a gradient to the host, behind what the accelerator is computing now."""
        mirror, grad = self._mirrors[parameter], parameter.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            where = label(self.param_groups[mirror.g], mirror.g, mirror.i)
            raise RuntimeError(f"{where} has a sparse gradient; use a dense one (nn.Embedding(sparse=False))")
        module, stream = torch.get_device_module(grad.device), self._stream(grad.device)
        stream.wait_stream(module.current_stream(grad.device))
        with module.stream(stream):
            held = mirror.host.grad
            if held is None or held.dtype != grad.dtype or held.stride() != grad.stride():
                if grad.dtype != mirror.host.dtype:
                    mirror.host.grad_dtype = grad.dtype
                held = mirror.host.grad = _buffer(grad)
            held.copy_(grad, non_blocking=True)
            if grad.device.type != "cpu":
                grad.record_stream(stream)  # its memory is not reused before the copy is done
        self._fetched.pop(parameter, None)
        self._fetched[parameter] = stream.record_event()
        setattr(grad, _MARK, grad._version)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            module = torch.get_device_module(device)
            self._streams[device] = module.Stream() if device.type == "cpu" else module.Stream(device)
        return self._streams[device]

    @torch._disable_dynamo  # copies and streams are nothing to compile; as torch does it, without importing dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the host and send the parameters back.

        Args:
            closure: recomputes the loss and returns it; called with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: as in ``AdamMini.step``, but parameters before the refused one have been stepped; a
                ``GradScaler`` with ``offload_gradients=True``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and self.offload_gradients:
            raise RuntimeError("a GradScaler cannot look at gradients that have left; use offload_gradients=False")
        if found_inf is not None and bool(found_inf):
            return loss
        self._host.grad_scale = None if scale is None else scale.cpu()  # type: ignore[attr-defined]
        self._share_numbers()
        # GradScaler.unscale_ divides in place and leaves no trace in version counters.
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
        """Fetch gradients that no hook has seen as they are now, and forget those cleared since."""
        self._require_places()
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

    def _require_places(self) -> None:
        """Raise RuntimeError where parameters left the groups or changed places: their copies would go on as before."""
        held = {p: (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        for parameter, mirror in self._mirrors.items():
            if held.get(parameter) != (mirror.g, mirror.i):
                where = label(self._host.param_groups[mirror.g], mirror.g, mirror.i)
                raise RuntimeError(
                    f"{where} was taken out of its place in param_groups; CPUOffload follows only what is added to "
                    "them: build it anew"
                )

    def _update(self, parameter: Tensor, event: Any) -> None:
        """Step one copy once its gradient has arrived, and start its way back."""
        mirror = self._mirrors[parameter]
        if event is not None:  # a CPU's streams have none
            event.synchronize()
        if parameter._version != mirror.version:
            mirror.host.copy_(parameter)
        self._host.step_parameter(mirror.g, mirror.i)
        self.state[parameter] = self._host.state[mirror.host]
        with torch.get_device_module(parameter.device).stream(self._stream(parameter.device)):
            parameter.copy_(mirror.host, non_blocking=True)
        mirror.version = parameter._version

    def _share_numbers(self) -> None:
        for mine, hosts in zip(self.param_groups, self._host.param_groups, strict=True):
            hosts.update({name: value for name, value in mine.items() if name != "params"})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, those on their way to the host included."""
        super().zero_grad(set_to_none)
        self._fetched.clear()

    def init_state(self) -> None:
        """Make all state now; see ``AdamMini.init_state``."""
        self._host.init_state()
        self._link_state()

    def state_bytes(self) -> dict[str, int]:
        """Bytes of state in host memory by kind; the copies of parameters and gradients come on top."""
        return self._host.state_bytes()

    def _link_state(self) -> None:
        self.state.clear()
        self.state.update({p: self._host.state[m.host] for p, m in self._mirrors.items() if m.host in self._host.state})

    def state_dict(self) -> dict[str, Any]:
        """AdamMini's state."""
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
        for mine, hosts in zip(self.param_groups, self._host.param_groups, strict=True):
            mine.update({name: value for name, value in hosts.items() if name != "params"})
        self._link_state()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("CPUOffload hangs on its parameters' hooks and cannot be copied or pickled; save state_dict()")


def _or(new: Any, old: Any) -> Any:
    return old if new is None else new


def _buffer(like: Tensor) -> Tensor:
    """Uninitialised host memory for a copy; pinned where an accelerator will read or write it."""
    return torch.empty_like(like, device="cpu", pin_memory=like.device.type != "cpu", requires_grad=False)
