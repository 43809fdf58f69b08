"""What a Hessian may be asked of: every refusal names the argument, its value and the next action."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

logger = logging.getLogger("hessian")


def own_parameters(model: nn.Module, params: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The parameters asked for, by the model's own names.

    Raises:
        ValueError: none, one the model does not have, one of another shape, a shared one twice, or dtypes that differ.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    if params is None:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("params is empty (or the model has no trainable parameters); name at least one parameter")
    for name, tensor in params.items():
        if name not in known:
            raise ValueError(f"params names {name!r}, which the model does not have; it has {sorted(known)[:5]}, ...")
        if known[name].shape != tensor.shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, the model's own {tuple(known[name].shape)}; "
                f"take it from "
                "model.named_parameters()"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"params[{name!r}] has dtype {tensor.dtype}; a Hessian needs floating-point parameters")
    dtypes = {tensor.dtype for tensor in params.values()}
    if len(dtypes) > 1:
        raise ValueError(f"params has several dtypes {sorted(map(str, dtypes))}; convert the model to one")
    if len({id(known[name]) for name in params}) < len(params):
        raise ValueError("params names one shared tensor twice; name tied weights once")
    return dict(params)


def deterministic(model: nn.Module) -> None:
    """Refuse modules that make a loss random or dependent on hidden state.

    Raises:
        ValueError: active dropout, or batch normalisation in training mode.
    """
    for name, module in model.named_modules():
        rate = getattr(module, "p", None) if isinstance(module, nn.modules.dropout._DropoutNd) else None
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            rate = module.dropout
        if module.training and rate:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) drops out with p={rate}, so the loss is random; "
                "call model.eval()"
            )
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is in training mode: every product would change its "
                "running statistics; call model.eval()"
            )


def usable_batches(batches: Sequence[Any] | None) -> list[Any]:
    """The batches as a list.

    Raises:
        ValueError: none, an empty one, or batches of differing structure.
    """
    batches = list(batches) if batches is not None else []
    if not batches:
        raise ValueError("batches is empty; give at least one batch (a list of whatever loss(model, batch) takes)")
    shapes = []
    for i, batch in enumerate(batches):
        leaves, spec = tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise ValueError(
                f"batches[{i}] is a {type(batch).__name__} in which no tensor is found; give tensors in tuples, lists "
                "or dicts (dict(batch) for a mapping of another type)"
            )
        if any(t.numel() == 0 for t in tensors):
            raise ValueError(f"batches[{i}] holds no data; drop it")
        shapes.append((str(spec), [(t.dtype, t.dim()) for t in tensors]))
        if shapes[i] != shapes[0]:
            raise ValueError(f"batches[{i}] has another structure than batches[0]: {shapes[i]} against {shapes[0]}")
    return batches


def example_count(batch: Any) -> int:
    """Rows of the first tensor in the batch."""
    first = next(leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))
    return int(first.shape[0]) if first.dim() else 1


def mean_loss(value_of: Callable[[Any], Any], batches: Sequence[Any]) -> None:
    """Check that the loss is a finite scalar, the same each time, and a mean over its batch.

    Raises:
        TypeError: not a floating-point scalar tensor.
        ValueError: NaN or infinite, different on the second call, or a sum.
    """
    for i, batch in enumerate(batches):
        value = value_of(batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            kind = (
                f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
            )
            raise TypeError(f"loss(model, batches[{i}]) gave {kind}; it must return a 0-dim floating-point tensor")
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"loss(model, batches[{i}]) is {value.item()}; find the batch or weight that causes it first"
            )
    first, again = value_of(batches[0]), value_of(batches[0])
    if not torch.equal(first, again):
        raise ValueError(
            f"loss(model, batches[0]) gave {first.item()} and then {again.item()}: it is random; call model.eval() and "
            "switch off functional dropout"
        )
    try:
        twice = value_of(tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, batches[0]))
    except Exception as error:  # any complaint of the loss about the size: it has just taken the batch itself
        logger.info("cannot check that the loss is a mean: the batch does not double (%s)", error)
        return
    if abs(twice.item() - first.item()) > 1e-3 * max(abs(first.item()), 1e-8):
        raise ValueError(
            f"loss is not a mean over the batch: it is {first.item():.6g} on batches[0] and {twice.item():.6g} on the "
            "same examples twice; use reduction='mean'"
        )


def dependence(
    grads_of: Callable[[Any, list[str]], dict[str, Tensor | None]], names: list[str], batches: Sequence[Any]
) -> None:
    """Check that some batch's loss depends on every parameter asked for.

    Raises:
        ValueError: naming those it does not depend on.
    """
    unused = list(names)
    for batch in batches:
        grads = grads_of(batch, unused)
        unused = [name for name in unused if grads[name] is None]
        if not unused:
            return
    raise ValueError(
        f"the loss does not depend on {unused[:5]}{'...' if len(unused) > 5 else ''}; leave them out of params"
    )


def require_chunk(chunk: int) -> None:
    """Raise ValueError unless ``chunk``, a number of products asked for at a time, is at least 1."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: it is how many products are asked for at a time")
