"""Discovery of what every parameter of a model does: from module types, then configurations, then names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..interface import whole_shape, whole_shapes, wrappers
from .families import (
    BARE,
    FAMILIES,
    LAYERS,
    Context,
    Family,
    is_convolution,
    is_dense,
    is_wrapper,
    parametrised,
    resolve,
    stored,
)
from .families.adapters import adapter_family
from .families.attention import SEPARATE
from .families.fused import FUSED
from .families.latent import LATENT
from .families.makers import rows, table_rows
from .names import by_name, clean, is_guessed_vector, role_of_name
from .roles import HEAD_ROLES, Anatomy, Role, whole

logger = logging.getLogger("optimizer")
_TAG = "_adam_mini_anatomy"
_NAME_TAG = "_adam_mini_name"


def discover(model: nn.Module) -> dict[str, Anatomy]:
    """Return the anatomy of every parameter, including frozen ones.

    Args:
        model: any module; it may be wrapped by DDP, torch.compile or activation checkpointing.

    Returns:
        Parameter name, as in ``model.named_parameters()``, -> Anatomy. A weight shared by several modules has one
        entry. It is that of the first of these modules, in ``named_modules`` order, whose parameters are recognised
        (an output layer tied to the embedding is an embedding); the choice is logged.

    Raises:
        ValueError: a lazy parameter is not initialised, or a configuration contradicts its module's weights.
    """
    with whole_shapes(model):
        return _discover(model)


def _discover(model: nn.Module) -> dict[str, Anatomy]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is not initialised; run one forward pass of the lazy module first")
        names[id(parameter)] = name
    anatomies: dict[int, Anatomy] = {}
    paths = dict(model.named_modules())
    # Wrappers are left out: their parameters are reached through the module they wrap.
    unwrapped = {path: module for path, module in paths.items() if not is_wrapper(module)}
    for path, module in unwrapped.items():
        _packed(module, anatomies)
        if adapters := _adapters(module):
            _claim(module, _lineage(paths, path), (adapter_family(adapters),), anatomies, names)
    for table in (FAMILIES, LAYERS):
        for path, module in unwrapped.items():
            _claim(module, _lineage(paths, path), table, anatomies, names)
    _embeddings(paths, anatomies)
    _output_layer(model, paths, anatomies)
    for path, module in paths.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in anatomies:
                context = Context(parameter, module, _lineage(paths, path))
                anatomies[id(parameter)] = _unclaimed(context, names[id(parameter)], leaf, anatomies)
    _log_shared(paths, names, anatomies)
    return {name: anatomies[key] for key, name in names.items()}


def _log_shared(paths: dict[str, nn.Module], names: dict[int, str], anatomies: dict[int, Anatomy]) -> None:
    """Log the role chosen for each weight that several modules share, because each of them may imply another role."""
    holders: dict[int, list[str]] = {}
    for path, module in paths.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    for key, shared in holders.items():
        if len(shared) > 1:
            role = anatomies[key].role.value
            logger.info("%s are one weight; its role is %s (%s)", " and ".join(shared), role, names[key])


def _packed(module: nn.Module, anatomies: dict[int, Anatomy]) -> None:
    """Add the weights that a quantiser packed into integers. They have an anatomy, but are never trained."""
    for _, parameter in module.named_parameters(recurse=False):
        if not (parameter.is_floating_point() or parameter.is_complex()):
            shape = tuple(parameter.shape)
            packed = whole(Role.OTHER, shape, f"packed integers ({parameter.dtype}): never trained")
            anatomies[id(parameter)] = replace(packed, trainable=False)


def _adapters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the LoRA adapters in a PEFT layer."""
    holders = (getattr(module, name, None) for name in ("lora_A", "lora_embedding_A"))
    return tuple(name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder)


def _lineage(paths: dict[str, nn.Module], path: str) -> list[nn.Module]:
    """Return the module at a path, then its ancestors, innermost first, without wrappers."""
    parts = path.split(".") if path else []
    outer = (paths[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1))
    return [paths[path], *(module for module in outer if not is_wrapper(module))]


def _claim(
    module: nn.Module,
    modules: list[nn.Module],
    table: Iterable[Family],
    anatomies: dict[int, Anatomy],
    names: dict[int, str],
) -> None:
    """Add the anatomies of a module's parameters from the families that match it; earlier entries are kept.

    Args:
        module: the module.
        modules: the module and its ancestors, innermost first.
        table: the families, in order of precedence.
        anatomies: ``id`` of a parameter -> Anatomy; extended in place.
        names: ``id`` of a parameter -> its name in the model.
    """
    for family in table:
        if not family.matches(module):
            continue
        for path, make in family.claims(module).items():
            target = resolve(module, path)
            if target is None or id(target[1]) in anatomies or id(target[1]) not in names:
                continue
            owner, tensor = target
            if owner is not module and tensor.ndim >= 2 and not _is_projection(owner):
                continue  # the child has the expected name, but is another kind of layer (an embedding, a norm)
            if owner is module and tensor.ndim >= 2 and not family.classes and id(family) in _ATTENTIONS:
                continue  # a bare tensor: without a known class, the meaning of its axes is unknown
            try:
                anatomies[id(tensor)] = make(Context(tensor, owner, modules), family.why)
            except ValueError as error:
                raise ValueError(f"parameter {names[id(tensor)]!r}: {error}") from error


_ATTENTIONS = frozenset(id(family) for family in (*FUSED, *LATENT, *SEPARATE))


def _is_projection(module: nn.Module) -> bool:
    """Whether a child that a family names can be a projection: a dense layer, a convolution or parallel experts."""
    return (
        is_dense(module)
        or is_convolution(module)
        or isinstance(module, nn.ParameterDict)
        or "Expert" in type(module).__name__
    )


def _embeddings(paths: dict[str, nn.Module], anatomies: dict[int, Anatomy]) -> None:
    """Add the tables of embedding layers, with one unit per row. The name distinguishes positions from tokens."""
    for path, module in paths.items():
        if not (isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__.endswith("Embedding")):
            continue
        weight = stored(module)
        if weight is not None and weight.ndim == 2 and id(weight) not in anatomies:
            position = role_of_name(path) is Role.POSITION_EMBEDDING
            role = Role.POSITION_EMBEDDING if position else Role.TOKEN_EMBEDDING
            anatomies[id(weight)] = whole(role, tuple(weight.shape), "embedding: rows are tokens", in_axis=1)


def _output_layer(model: nn.Module, paths: dict[str, nn.Module], anatomies: dict[int, Anatomy]) -> None:
    """Add the output layers.

    These are ``get_output_embeddings()`` of transformers, and dense layers that have the name of an output layer, or
    the shape of the token embedding at the top of the model.
    """
    candidates: list[tuple[nn.Module, str]] = []
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter) and isinstance(output := getter(), nn.Module):
        candidates.append((output, "the model's get_output_embeddings()"))
    tables = {tuple(m.weight.shape) for m in paths.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for path, module in reversed(paths.items()):
        weight = stored(module) if is_dense(module) else None
        if weight is None or id(weight) in anatomies:
            continue
        if role_of_name(f"{path}.weight") is Role.HEAD:
            candidates.append((module, "recognised by its name"))
        elif tuple(weight.shape) in tables and weight.shape[0] > weight.shape[1] and clean(path).count(".") <= 1:
            candidates.append((module, "has the shape of the token embedding, at the top of the model"))
    for module, why in candidates:
        weight = stored(module)
        if weight is not None and weight.ndim == 2 and id(weight) not in anatomies:
            anatomies[id(weight)] = rows(Role.HEAD)(Context(weight, module, [module]), f"output layer: {why}")


_FUSED_NAME = re.compile(r"(?i)(^|_)(qkv|wqkv|query_key_value|c_attn|kv|qk|to_kv|in_proj_qkv\w*|kv_proj|qk_proj)(_|$)")


def _unclaimed(context: Context, name: str, leaf: str, anatomies: dict[int, Anatomy]) -> Anatomy:
    """Return the anatomy of a parameter that no family claims: from its module, otherwise from its name.

    Args:
        context: the parameter and the modules around it.
        name: its name in the model.
        leaf: its name in the module that owns it.
        anatomies: the anatomies known so far, by ``id`` of the parameter.
    """
    tensor, owner = context.tensor, context.owner
    base, base_leaf = parametrised(context, leaf)
    if stored(base, base_leaf) is tensor and base_leaf != leaf:  # a parametrization computes the base tensor from it
        path = name.removesuffix(f".parametrizations.{base_leaf}.{leaf}").removesuffix(f".{leaf}")
        modules = context.modules[2:] if base is not owner else context.modules
        return _unclaimed(Context(tensor, base, modules), f"{path}.{base_leaf}", base_leaf, anatomies)
    if is_dense(owner) and leaf == "weight" and tensor.ndim >= 2:
        role = role_of_name(name)
        layer_name = clean(name).rpartition(".")[0].rpartition(".")[2]  # empty if the model itself is the layer
        suspicious = role in HEAD_ROLES or _FUSED_NAME.search(layer_name)
        if suspicious or (role is not Role.ATTENTION_OUT and _inside_attention(context, anatomies)):
            return _doubtful(context, name)
        dense_role = role if role in (Role.ATTENTION_OUT, Role.MLP_OUT) else Role.MLP_IN
        why = f"a dense layer ({type(owner).__name__}): one unit per output"
        return replace(rows(dense_role)(context, why), declared=False)
    bare = next((row for row in BARE if row.matches(context, leaf)), None)
    if bare is not None:
        return bare.make(context, bare.why)
    if tensor.ndim >= 2 and role_of_name(name) is Role.POSITION_EMBEDDING:
        return table_rows(Role.POSITION_EMBEDDING)(context, f"a position table, recognised by its name {name!r}")
    if tensor.ndim <= 1:
        return by_name(name, context.shape)
    return whole(Role.OTHER, context.shape, f"{type(owner).__name__}.{leaf} is not in the table of families")


def _inside_attention(context: Context, anatomies: dict[int, Anatomy]) -> bool:
    """Whether a layer belongs to a module with "attention" in its class name whose projections are unknown.

    Containers and modules around a single layer do not count as a level, because a list of projections belongs to the
    attention around it. If the queries, keys or values of that attention are known, however, other layers in the
    container form a feed-forward block.
    """
    around = [module for module in context.modules[1:] if not _is_transparent(module)]
    if _is_called_attention(context.owner):
        return True
    if not around or not _is_called_attention(around[0]):
        return False
    if around[0] is context.modules[1]:
        return True
    roles = {part.role for p in around[0].parameters() if id(p) in anatomies for part in anatomies[id(p)].parts}
    return not roles & HEAD_ROLES


def _is_called_attention(module: nn.Module) -> bool:
    """Whether the class name of a module contains "attention" or "attn"."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _is_transparent(module: nn.Module) -> bool:
    """Whether a module is a container, a wrapper, or a module with a single matrix that is no attention."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or [*module._modules] == ["module"]:
        return True
    matrices = (p for p in module.parameters() if p.ndim >= 2)
    return not _is_called_attention(module) and len(list(islice(matrices, 2))) == 1


def _doubtful(context: Context, name: str) -> Anatomy:
    """Return the anatomy of a matrix in an attention that no family describes: its role is unknown."""
    around = (module for module in context.modules[1:] if not _is_transparent(module))
    kind = type(next(around, context.owner)).__name__
    why = f"inside {kind}, an attention that no family describes ({clean(name)})"
    return replace(context.plain(Role.OTHER, why), declared=False)


# --- parameters whose model is not available ------------------------------------------------------------------------


def tag(model: nn.Module) -> nn.Module:
    """Stamp each parameter of a model with its anatomy and name, so that ``AdamMini(list_of_params)`` can use them.

    Args:
        model: the model; its parameters get attributes, their values do not change.

    Returns:
        The model itself.

    Raises:
        ValueError: as for ``partition``: a parameter is not initialised, or a configuration contradicts the weights.
    """
    parameters = dict(model.named_parameters())
    for name, anatomy in discover(model).items():
        if name in parameters:  # parameters that FSDP flattened are described by the wrapper below
            setattr(parameters[name], _TAG, anatomy)
            setattr(parameters[name], _NAME_TAG, name)
    for wrapper in wrappers():
        wrapper.describe_model(model, discover)
    return model


def tagged(parameter: Tensor, shape: tuple[int, ...] | None = None) -> Anatomy | None:
    """Return the anatomy that ``tag`` stamped on a parameter; None without one, or if the shape has changed.

    Args:
        parameter: the parameter.
        shape: its shape before it was sharded; None for the shape of the whole parameter as it is now.
    """
    anatomy, shape = getattr(parameter, _TAG, None), whole_shape(parameter) if shape is None else shape
    return anatomy if isinstance(anatomy, Anatomy) and anatomy.shape == shape else None


def tagged_or_named(parameter: Tensor, name: str, shape: tuple[int, ...]) -> Anatomy:
    """Return the anatomy of a parameter without its model: from its tag, otherwise from its name and shape."""
    return tagged(parameter, shape) or by_name(name, shape)


def tagged_name(parameter: Tensor) -> str:
    """Return the name that ``tag`` stamped on a parameter, which overrides are matched with; "" without one."""
    return str(getattr(parameter, _NAME_TAG, "")) if tagged(parameter) is not None else ""


def module_behind(params: Any) -> nn.Module | None:
    """Return the model whose ``parameters()`` or ``named_parameters()`` returned ``params``; None for anything else.

    Both methods return generators, and a generator that has not finished refers to the module it iterates over. With
    this module, ``AdamMini(model.parameters())`` recognises roles as well as ``AdamMini(model)`` does.
    """
    frame = getattr(params, "gi_frame", None)
    owner = frame.f_locals.get("self") if frame is not None else None
    if not isinstance(owner, nn.Module):
        return None
    methods = (getattr(type(owner), name, None) for name in ("parameters", "named_parameters"))
    if any(getattr(method, "__code__", object()) is params.gi_code for method in methods):
        return owner
    return None  # another generator, whose "self" is not the model


def report_unknown(unknown: dict[str, Anatomy], unit: str, *, strict: bool) -> None:
    """Log which weights were not recognised, and which vectors may be biases or norms.

    Args:
        unknown: parameter name -> anatomy.
        unit: the unit that the rules assign to the role OTHER.
        strict: whether to raise an error instead of logging a warning.

    Raises:
        ValueError: with ``strict``, if weights were not recognised.
    """
    if vectors := [name for name, anatomy in unknown.items() if is_guessed_vector(anatomy)]:
        listed = ", ".join(vectors[:8]) + (", ..." if vectors[8:] else "")
        logger.info("%d vector(s) may be biases or norms and get the unit of biases: %s", len(vectors), listed)
    unknown = {name: anatomy for name, anatomy in unknown.items() if not is_guessed_vector(anatomy)}
    if not unknown:
        return
    listing = "; ".join(f"{name} {anatomy.shape} ({anatomy.reason})" for name, anatomy in list(unknown.items())[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    text = (
        f"{len(unknown)} weight(s) not recognised: {listing}{more}. Unrecognised weights get the unit of the role "
        f"OTHER ({unit}); attention heads of unknown size get one scalar per row. "
        "Pass the model itself (or tag(model) first), declare the family in optimizer/partition/families/, or "
        "choose another unit for OTHER in the rules"
    )
    if strict:
        raise ValueError(text)
    logger.warning(text)
