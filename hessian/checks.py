"""Checks of the arguments of this package. Every error message names the argument, its value and the next action."""

from __future__ import annotations

import logging
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .weights import IGNORED, doubled, tensors_of

logger = logging.getLogger("hessian")
CHECKPOINTING = (
    "gradient checkpointing is on, and torch cannot differentiate through it twice. Switch it off: "
    "model.gradient_checkpointing_disable() for Hugging Face models (or model.eval(), if the model uses it in training "
    "only); in other models call the module itself instead of torch.utils.checkpoint.checkpoint"
)


def checked_parameters(model: nn.Module, params: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the requested parameters, keyed by their names in the model.

    Args:
        model: the model that has the parameters.
        params: name -> tensor, or None for all trainable parameters.

    Raises:
        TypeError: params is not a mapping, or one of its values is not a tensor.
        ValueError: params is empty, names a parameter that the model does not have, has a tensor of another shape,
            names a shared tensor twice, has NaN or infinite values, or has more than one dtype; or another parameter
            of the model is not finite.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"params is a {type(params).__name__}; it must be a dict name -> tensor, such as "
            "dict(model.named_parameters()), or None for all trainable parameters"
        )
    model_params = dict(model.named_parameters(remove_duplicate=False))
    if params is None:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("params is empty (or the model has no trainable parameters); name at least one parameter")
    for name, tensor in params.items():
        if name not in model_params:
            raise ValueError(
                f"params names {name!r}, which the model does not have; it has {sorted(model_params)[:5]}, ..."
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(tensor).__name__}; it must be a tensor")
        if model_params[name].shape != tensor.shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, but in the model its shape is "
                f"{tuple(model_params[name].shape)}; use the tensor of model.named_parameters()"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"params[{name!r}] has dtype {tensor.dtype}; a Hessian needs floating-point parameters")
        finite(f"params[{name!r}]", tensor)
    for name, tensor in model_params.items():
        if name not in params and tensor.is_floating_point():
            finite(f"the model's parameter {name!r}, which is not in params,", tensor)
    dtypes = {tensor.dtype for tensor in params.values()}
    if len(dtypes) > 1:
        raise ValueError(f"params has several dtypes {sorted(map(str, dtypes))}; convert the model to one")
    if len({id(model_params[name]) for name in params}) < len(params):
        raise ValueError("params names one shared tensor twice; name tied weights once")
    return dict(params)


def deterministic(model: nn.Module) -> None:
    """Check that no module makes the loss random or changes its own state in a forward pass.

    Raises:
        ValueError: dropout is active, or batch normalisation is in training mode.
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
    """Return the batches as a list.

    Raises:
        ValueError: there is no batch, a batch has no data, or two batches differ in structure.
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
                f"batches[{i}] is a {type(batch).__name__} that contains no tensor; pass tensors in tuples, lists "
                "or dicts (dict(batch) for a mapping of another type)"
            )
        if any(t.numel() == 0 for t in tensors):
            raise ValueError(f"batches[{i}] holds no data; leave it out")
        shapes.append((str(spec), [(t.dtype, t.dim()) for t in tensors]))
        if shapes[i] != shapes[0]:
            raise ValueError(
                f"batches[{i}] has another structure than batches[0]: {shapes[i]} against {shapes[0]}; give all "
                "batches the same nesting, dtypes and numbers of axes"
            )
    return batches


def described(value: Any) -> str:
    """Describe a loss's wrong return value without printing its contents, and say how to get the number from it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    name = type(value).__name__
    inner_loss = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    if isinstance(inner_loss, Tensor):
        return f"a {name}, which holds the loss: return its .loss" + (" (['loss'])" if type(value) is dict else "")
    if isinstance(value, (tuple, list)):
        return f"a {name} of {len(value)}: return the one element that is the loss"
    return f"a {name}"


def mean_loss(value_of: Callable[[Any], Any], batches: Sequence[Any], *, mean_check: bool = True) -> None:
    """Check that the loss of every batch is a finite scalar, deterministic, and a mean over its batch.

    Args:
        value_of: batch -> loss.
        batches: the batches.
        mean_check: whether to check that the loss is a mean, by evaluating it on every example twice.

    Raises:
        TypeError: a loss is not a floating-point scalar tensor.
        ValueError: a loss is NaN or infinite, differs between two calls, or is not a mean.
    """
    for i, batch in enumerate(batches):
        value = value_of(batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"loss(model, batches[{i}]) returned {described(value)}; it must return a 0-dim floating-point tensor"
            )
        if not bool(torch.isfinite(value)):
            raise ValueError(f"loss(model, batches[{i}]) is {value.item()}; {_why_not_finite(batch)}")
        again = value_of(batch)
        if not torch.equal(value, again):
            raise ValueError(
                f"loss(model, batches[{i}]) returned {value.item()} and then {again.item()}, so it is random; call "
                "model.eval() and switch off functional dropout"
            )
        if mean_check:
            _is_mean(value_of, batches, i, value)


def _why_not_finite(batch: Any) -> str:
    for path, tensor in tensors_of(batch).items():
        if not tensor.is_floating_point() and bool((tensor == IGNORED).all()):
            return (
                f"every label in batch{path} is {IGNORED}, which losses ignore: its mean is over nothing, leave it out"
            )
    return "find the batch or weight that causes it first"


def _is_mean(value_of: Callable[[Any], Any], batches: Sequence[Any], i: int, once: Tensor) -> None:
    """Raise ValueError if the loss changes when every example of a batch occurs twice."""
    batch = doubled(batches[i], batches)
    if batch is None:
        logger.info("cannot check that the loss is a mean: the examples of batches[%d] cannot be identified", i)
        return
    try:
        twice = value_of(batch)
    except Exception as error:  # The loss accepted the batch itself, so any error here is about the doubled size.
        logger.info("cannot check that the loss is a mean: it fails on the doubled batches[%d] (%s)", i, error)
        return
    allowed = max(1e-3, 4 * torch.finfo(once.dtype).eps)
    if abs(twice.item() - once.item()) > allowed * max(abs(once.item()), 1e-8):
        raise ValueError(
            f"loss is not a mean over the batch: it is {once.item():.6g} on batches[{i}], and {twice.item():.6g} when "
            "every example occurs twice; use reduction='mean' (for Hugging Face models leave num_items_in_batch out), "
            "or pass mean_check=False if it compares the examples of a batch with each other, as contrastive losses do"
        )


def second_derivative(error: Exception) -> RuntimeError:
    """Turn torch's error about a missing second derivative into one that says what to do about it."""
    if checkpointed(error):
        return RuntimeError(f"{CHECKPOINTING} ({error})")
    if "saved tensor hooks" in str(error):
        return RuntimeError(
            f"saved-tensor hooks are active, such as those of torch.autograd.graph.save_on_cpu: {error}. Leave their "
            "context before you create and use the operator"
        )
    return RuntimeError(
        f"the loss has no second derivative: {error}. An operation in the model cannot be differentiated "
        "twice; replace it (a custom autograd function, flex or flash attention) with plain torch "
        "operations, attention with torch.nn.functional.scaled_dot_product_attention"
    )


def checkpointed(error: BaseException) -> bool:
    """Return whether an error, or an error that caused it, was raised inside ``torch.utils.checkpoint``."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if any(name == torch.utils.checkpoint.__file__ for name in frames):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def gradients(
    grads_of: Callable[[Any, list[str]], dict[str, Tensor | None]], names: list[str], batches: Sequence[Any]
) -> None:
    """Check that gradients are deterministic, and that every requested parameter influences the loss of some batch.

    Args:
        grads_of: (batch, names) -> gradient of each named parameter, None if the loss does not depend on it.
        names: the requested parameters.
        batches: the batches.

    Raises:
        ValueError: two gradients of one batch differ, or the loss does not depend on some parameters; the message names
            them.
    """
    unused = set(names)
    for i, batch in enumerate(batches):
        first, second = grads_of(batch, names), grads_of(batch, names)
        for name in names:
            one, two = first.pop(name), second.pop(name)
            if one is None or two is None:
                continue
            unused.discard(name)
            allowed = math.sqrt(torch.finfo(one.dtype).eps) * float(one.abs().max())  # sums of threads vary in order
            if not float((one - two).abs_().max()) <= allowed and bool(torch.isfinite(one).all()):
                raise ValueError(
                    f"the gradient of batches[{i}] in {name!r} is not deterministic: two calls differ by "
                    f"{float((one - two).abs().max()):.2g}, so products would be random, although the loss is not; fix "
                    "what draws random numbers in the backward pass, such as stochastic rounding"
                )
    if unused:
        listed = [name for name in names if name in unused]
        raise ValueError(
            f"the loss does not depend on {listed[:5]}{'...' if len(listed) > 5 else ''}; leave them out of params"
        )


def at_least(name: str, value: Any, least: int, why: str = "") -> None:
    """Check that a count is an integer and not too small.

    Args:
        name: the argument's name, for the message.
        value: its value.
        least: the smallest valid value.
        why: the reason for that bound, for the message.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an integer, at least {least}{why and ': ' + why}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}{why and ': ' + why}")


def finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor has NaN or infinite entries."""
    # Least and greatest entry are NaN or infinite if any entry is, and need no copy of the tensor.
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
        raise ValueError(f"{name} has NaN or infinite entries; find the batch or weight that causes them first")


def square(matrix: Any, name: str = "matrix") -> None:
    """Check that a value is a finite, square, floating-point matrix.

    Raises:
        TypeError: it is not a tensor, or has an integer or boolean dtype.
        ValueError: it is not square, is empty, or has NaN or infinite entries.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} is a {type(matrix).__name__}; it must be a square tensor (torch.as_tensor)")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it must be square and not empty")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} has dtype {matrix.dtype}; it must be a floating-point tensor: pass {name}.double()")
    finite(name, matrix)
