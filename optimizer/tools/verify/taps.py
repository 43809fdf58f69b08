"""Record the inputs and outputs of every projection during a forward pass.

The output of every projection is detached from the graph and replaced by a new leaf. A gradient with respect to the
leaf is then the effect of this output alone, and a backward pass stops at the projections of one attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...partition.families import is_convolution, is_dense


@dataclass
class Watched:
    """Inputs and outputs recorded during one forward pass.

    Attributes:
        outputs: module path -> leaf that replaced the output of the module's first call, in the module's own layout.
        inputs: module path -> input of the module's first call, features last.
        order: paths of projections in the order of their first calls.
        joint: path of a ``nn.MultiheadAttention`` -> (its query, key and value inputs, its output), features last.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    joint: dict[str, tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=dict)


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is a dense, convolution or expert layer with a weight of two or more dimensions."""
    weight = getattr(module, "weight", None)
    is_known_type = is_dense(module) or is_convolution(module) or "Expert" in type(module).__name__
    return isinstance(weight, Tensor) and weight.ndim >= 2 and is_known_type


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Record calls of every projection, norm and ``nn.MultiheadAttention`` of a model inside the ``with`` block."""
    seen, active = Watched(), set[str]()
    handles = []
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(_joint_inputs, with_kwargs=True))
            handles.append(module.register_forward_hook(_joint_output(seen, path), with_kwargs=True))
        elif is_projection(module) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            weights[id(module.weight)] = (path, module)
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: active.add(path)))
            handles.append(module.register_forward_hook(_cut(seen, path, active)))
        elif "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(_freeze_scale))
    try:
        with _Functions(seen, weights, active):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _features_last(tensor: Tensor, module: nn.Module) -> Tensor:
    """Move the channels of a convolution's tensor to the last axis."""
    return tensor.movedim(1, -1) if is_convolution(module) and tensor.ndim >= 3 else tensor


class _Functions(TorchFunctionMode):
    """Record projections and norms that are function calls, for example BEiT's ``linear`` with a module's weight."""

    def __init__(self, seen: Watched, weights: dict[int, tuple[str, nn.Module]], active: set[str]) -> None:
        super().__init__()
        self._seen, self._weights, self._active = seen, weights, active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _NORMS:
            frozen = _freeze_scale(None, args, output)
            return output if frozen is None else frozen
        if func is not nn.functional.linear:
            return output
        weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        path, module = self._weights.get(id(weight), ("", None))
        if module is None or path in self._active:
            return output
        cut = _cut(self._seen, path, set())(module, args or ((kwargs or {}).get("input"),), output)
        return output if cut is None else cut


def _cut(seen: Watched, path: str, active: set[str]) -> Any:
    """Return a forward hook that records a projection's call and replaces its output by a new leaf."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        active.discard(path)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        leaf = output.detach().requires_grad_()
        if path not in seen.outputs:
            seen.outputs[path] = leaf
            seen.order.append(path)
            if args and isinstance(args[0], Tensor):
                seen.inputs[path] = _features_last(args[0], module)
        return leaf.clone()  # A clone, because the model may write in place, which a leaf refuses.

    return hook


_NORMS = (nn.functional.normalize, nn.functional.layer_norm, nn.functional.rms_norm, nn.functional.group_norm)


def _freeze_scale(module: nn.Module | None, args: tuple[Any, ...], output: Any) -> Any:
    """Treat a norm's statistics as constants, because they couple all units, also those of different heads."""
    normed = args[0] if args else None
    if not (isinstance(output, Tensor) and isinstance(normed, Tensor) and output.numel() == normed.numel()):
        return None
    if not normed.is_floating_point() or not output.requires_grad:
        return None
    normed = normed.reshape(output.shape)
    scale = torch.where(normed == 0, 0.0, output / normed).detach()
    return (output - normed * scale).detach() + normed * scale


def _joint_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Set ``need_weights=False`` unless the caller sets it.

    The inputs need no new leaves: ``open_output`` in ``joint`` has made the weights leaves with gradients.
    """
    return args, {**kwargs, "need_weights": kwargs.get("need_weights", False)}


def _joint_output(seen: Watched, path: str) -> Any:
    """Return a forward hook that records the first call of a ``nn.MultiheadAttention``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = ("query", "key", "value")
        inputs = [kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names)]
        if path not in seen.joint:
            seen.joint[path] = ((inputs[0].detach(), inputs[1].detach(), inputs[2].detach()), output[0])

    return hook
