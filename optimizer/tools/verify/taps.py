"""Watch a forward pass: what every projection puts out, and what the output projections of attention take in.

Every projection's output is cut from the graph and handed on as a fresh leaf, so that a gradient says what that output
itself does, and backward passes stay inside one attention.
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
    """One forward pass.

    Attributes:
        outputs: module path -> the cut output of its first call, features last, [..., features].
        inputs: module path -> what its first call took in, features last.
        order: paths of projections in the order of their first calls.
        joint: path of a ``nn.MultiheadAttention`` -> (query, key, value) it was given and what came out, features last.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    joint: dict[str, tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=dict)


def is_projection(module: nn.Module) -> bool:
    """A layer whose output units the watcher can tell apart."""
    weight = getattr(module, "weight", None)
    known = is_dense(module) or is_convolution(module) or "Expert" in type(module).__name__
    return isinstance(weight, Tensor) and weight.ndim >= 2 and known


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Hooks on every projection, norm and MultiheadAttention of a model, for as long as it lasts."""
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
    return tensor.movedim(1, -1) if is_convolution(module) and tensor.ndim >= 3 else tensor


class _Functions(TorchFunctionMode):
    """What is done without calling a module: projections by a borrowed weight (BEiT), norms as functions."""

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
        return leaf.clone()  # the caller may write to it, which a leaf would refuse

    return hook


_NORMS = (nn.functional.normalize, nn.functional.layer_norm, nn.functional.rms_norm, nn.functional.group_norm)


def _freeze_scale(module: nn.Module | None, args: tuple[Any, ...], output: Any) -> Any:
    """Keep a norm's statistics as constants: they tie all units together without making them one head."""
    given = args[0] if args else None
    if not (isinstance(output, Tensor) and isinstance(given, Tensor) and output.numel() == given.numel()):
        return None
    if not given.is_floating_point() or not output.requires_grad:
        return None
    given = given.reshape(output.shape)
    scale = torch.where(given == 0, 0.0, output / given).detach()
    return (output - given * scale).detach() + given * scale


def _joint_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Weights become leaves by themselves; only make sure that torch keeps the slow, differentiable path."""
    return args, {**kwargs, "need_weights": kwargs.get("need_weights", False)}


def _joint_output(seen: Watched, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = ("query", "key", "value")
        given = [kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names)]
        if path not in seen.joint:
            seen.joint[path] = ((given[0].detach(), given[1].detach(), given[2].detach()), output[0])

    return hook
