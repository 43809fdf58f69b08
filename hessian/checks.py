"""What a Hessian may be asked of: every refusal names the argument, its value and the next action."""

from __future__ import annotations

import logging
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .weights import doubled

logger = logging.getLogger("hessian")
CHECKPOINTING = (
    "gradient checkpointing is on, and torch cannot differentiate through it twice. Switch it off: "
    "model.gradient_checkpointing_disable() for Hugging Face models (or model.eval(), where it is used in training "
    "only), elsewhere call the module instead of torch.utils.checkpoint.checkpoint"
)


def own_parameters(model: nn.Module, params: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The parameters asked for, by the model's own names.

    Raises:
        TypeError: params is no mapping, or a value no tensor.
        ValueError: none, one the model does not have, one of another shape, a shared one twice, NaN or infinite
            values, or dtypes that differ.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"params is a {type(params).__name__}; it must be a dict name -> tensor, such as "
            "dict(model.named_parameters()), or None for all trainable parameters"
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    if params is None:
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("params is empty (or the model has no trainable parameters); name at least one parameter")
    for name, tensor in params.items():
        if name not in known:
            raise ValueError(f"params names {name!r}, which the model does not have; it has {sorted(known)[:5]}, ...")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(tensor).__name__}; it must be a tensor")
        if known[name].shape != tensor.shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(tensor.shape)}, the model's own {tuple(known[name].shape)}; "
                "take it from model.named_parameters()"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"params[{name!r}] has dtype {tensor.dtype}; a Hessian needs floating-point parameters")
        finite(f"params[{name!r}]", tensor)
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


def described(value: Any) -> str:
    """What a loss returned instead of a number, without its contents, and how to get the number out of it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    name = type(value).__name__
    held = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    if isinstance(held, Tensor):
        return f"a {name}, which holds the loss: return its .loss" + (" (['loss'])" if type(value) is dict else "")
    if isinstance(value, (tuple, list)):
        return f"a {name} of {len(value)}: return the one element that is the loss"
    return f"a {name}"


def mean_loss(value_of: Callable[[Any], Any], batches: Sequence[Any], *, mean_check: bool = True) -> None:
    """Check that the loss of every batch is a finite scalar, the same each time, and a mean over its batch.

    Raises:
        TypeError: not a floating-point scalar tensor.
        ValueError: NaN or infinite, different on the second call, or a sum.
    """
    for i, batch in enumerate(batches):
        value = value_of(batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"loss(model, batches[{i}]) gave {described(value)}; it must return a 0-dim floating-point tensor"
            )
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"loss(model, batches[{i}]) is {value.item()}; find the batch or weight that causes it first"
            )
        again = value_of(batch)
        if not torch.equal(value, again):
            raise ValueError(
                f"loss(model, batches[{i}]) gave {value.item()} and then {again.item()}: it is random; call "
                "model.eval() and switch off functional dropout"
            )
        if mean_check:
            _is_mean(value_of, batches, i, value)


def _is_mean(value_of: Callable[[Any], Any], batches: Sequence[Any], i: int, once: Tensor) -> None:
    """Raise ValueError when the same examples twice have another loss than once."""
    batch = doubled(batches[i], batches)
    if batch is None:
        logger.info("cannot check that the loss is a mean: what an example of batches[%d] is cannot be told", i)
        return
    try:
        twice = value_of(batch)
    except Exception as error:  # any complaint of the loss about the size: it has just taken the batch itself
        logger.info("cannot check that the loss is a mean: batches[%d] does not double (%s)", i, error)
        return
    allowed = max(1e-3, 4 * torch.finfo(once.dtype).eps)
    if abs(twice.item() - once.item()) > allowed * max(abs(once.item()), 1e-8):
        raise ValueError(
            f"loss is not a mean over the batch: it is {once.item():.6g} on batches[{i}] and {twice.item():.6g} on the "
            "same examples twice; use reduction='mean' (for Hugging Face models leave num_items_in_batch out), or pass "
            "mean_check=False if it compares the examples of a batch with each other, as contrastive losses do"
        )


def second_derivative(error: Exception) -> RuntimeError:
    """torch's complaint about something it cannot differentiate twice, with what to do about it."""
    if checkpointed(error):
        return RuntimeError(f"{CHECKPOINTING} ({error})")
    if "saved tensor hooks" in str(error):
        return RuntimeError(
            f"saved-tensor hooks are active (torch.autograd.graph.save_on_cpu and its like): {error}. Leave their "
            "context before the operator is made and used"
        )
    return RuntimeError(
        f"the loss has no second derivative: {error}. An operation in the model cannot be differentiated "
        "twice; replace it (a custom autograd function, flex or flash attention) by plain torch "
        "operations, for attention by torch.nn.functional.scaled_dot_product_attention"
    )


def checkpointed(error: BaseException) -> bool:
    """Whether an error, or one that it came from, was raised inside ``torch.utils.checkpoint``."""
    at: BaseException | None = error
    while at is not None:
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(at.__traceback__)]
        if any(name == torch.utils.checkpoint.__file__ for name in frames):
            return True
        at = at.__cause__ or at.__context__
    return False


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


def at_least(name: str, value: Any, least: int, why: str = "") -> None:
    """Check a count that a caller gave.

    Raises:
        TypeError: not an integer.
        ValueError: below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an integer, at least {least}{why and ': ' + why}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}{why and ': ' + why}")


def finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor has NaN or infinite entries."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has NaN or infinite entries; find the batch or weight that causes them first")


def square(matrix: Any, name: str = "matrix") -> None:
    """Check a matrix.

    Raises:
        TypeError: not a tensor, or of integers or booleans.
        ValueError: not square, empty, or with NaN or infinite entries.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} is a {type(matrix).__name__}; it must be a square tensor (torch.as_tensor)")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it must be square and not empty")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} has dtype {matrix.dtype}; it must be of floating point: pass {name}.double()")
    finite(name, matrix)
