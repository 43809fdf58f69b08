"""What every parameter of a model does: from module types first, then configurations, then names."""

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
    """The anatomy of every parameter, frozen ones included.

    Args:
        model: any module, also wrapped by DDP, torch.compile or activation checkpointing.

    Returns:
        name as in ``model.named_parameters()`` -> Anatomy. A weight shared by two modules has one entry, that of the
        first of them in ``named_modules`` order that knows it (a tied output layer counts as the embedding); the
        choice is logged.

    Raises:
        ValueError: an uninitialised lazy parameter, or a configuration that contradicts its module's weights.
    """
    with whole_shapes(model):
        return _discover(model)


def _discover(model: nn.Module) -> dict[str, Anatomy]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is not initialised; run one forward pass of the lazy module first")
        names[id(parameter)] = name
    found: dict[int, Anatomy] = {}
    paths = dict(model.named_modules())
    own = {path: module for path, module in paths.items() if not is_wrapper(module)}  # others answer as what they wrap
    for path, module in own.items():
        _packed(module, found)
        if adapters := _adapters(module):
            _claim(module, _lineage(paths, path), (adapter_family(adapters),), found, names)
    for table in (FAMILIES, LAYERS):
        for path, module in own.items():
            _claim(module, _lineage(paths, path), table, found, names)
    _embeddings(paths, found)
    _output_layer(model, paths, found)
    for path, module in paths.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in found:
                context = Context(parameter, module, _lineage(paths, path))
                found[id(parameter)] = _leaf(context, names[id(parameter)], leaf, found)
    _say_shared(paths, names, found)
    return {name: found[key] for key, name in names.items()}


def _say_shared(paths: dict[str, nn.Module], names: dict[int, str], found: dict[int, Anatomy]) -> None:
    """Log what a weight is taken for that several modules hold: a choice, since each might call it something else."""
    holders: dict[int, list[str]] = {}
    for path, module in paths.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    for key, shared in holders.items():
        if len(shared) > 1:
            logger.info("%s are one weight: taken as %s (%s)", " and ".join(shared), found[key].role.value, names[key])


def _packed(module: nn.Module, found: dict[int, Anatomy]) -> None:
    """Weights a quantiser packed into integers: they have a layout like everything else, but no step ever reads it."""
    for _, parameter in module.named_parameters(recurse=False):
        if not (parameter.is_floating_point() or parameter.is_complex()):
            shape = tuple(parameter.shape)
            packed = whole(Role.OTHER, shape, f"packed integers ({parameter.dtype}): never trained")
            found[id(parameter)] = replace(packed, trainable=False)


def _adapters(module: nn.Module) -> tuple[str, ...]:
    """Names of the LoRA adapters a PEFT layer carries."""
    holders = (getattr(module, name, None) for name in ("lora_A", "lora_embedding_A"))
    return tuple(name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder)


def _lineage(paths: dict[str, nn.Module], path: str) -> list[nn.Module]:
    """The module at a path, then its ancestors, innermost first, without those that only wrap another."""
    parts = path.split(".") if path else []
    outer = (paths[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1))
    return [paths[path], *(module for module in outer if not is_wrapper(module))]


def _claim(
    module: nn.Module,
    modules: list[nn.Module],
    table: Iterable[Family],
    found: dict[int, Anatomy],
    names: dict[int, str],
) -> None:
    """Let the families that match the module speak of its parameters; the earlier word stands."""
    for family in table:
        if not family.matches(module):
            continue
        for path, make in family.claims(module).items():
            target = resolve(module, path)
            if target is None or id(target[1]) in found or id(target[1]) not in names:
                continue
            owner, tensor = target
            if owner is not module and tensor.ndim >= 2 and not _is_projection(owner):
                continue  # the child is something else under the same name (an embedding, a norm)
            if owner is module and tensor.ndim >= 2 and not family.classes and id(family) in _ATTENTIONS:
                continue  # a bare tensor, and no class that says which of its axes are heads and units
            try:
                found[id(tensor)] = make(Context(tensor, owner, modules), family.why)
            except ValueError as error:
                raise ValueError(f"parameter {names[id(tensor)]!r}: {error}") from error


_ATTENTIONS = frozenset(id(family) for family in (*FUSED, *LATENT, *SEPARATE))


def _is_projection(module: nn.Module) -> bool:
    """Whether a child that a family names can be a projection: dense, convolution, experts in parallel."""
    return (
        is_dense(module)
        or is_convolution(module)
        or isinstance(module, nn.ParameterDict)
        or "Expert" in type(module).__name__
    )


def _embeddings(paths: dict[str, nn.Module], found: dict[int, Anatomy]) -> None:
    """nn.Embedding: one unit per row; the name only tells positions from tokens."""
    for path, module in paths.items():
        if not (isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__.endswith("Embedding")):
            continue
        weight = stored(module)
        if weight is not None and weight.ndim == 2 and id(weight) not in found:
            position = role_of_name(path) is Role.POSITION_EMBEDDING
            role = Role.POSITION_EMBEDDING if position else Role.TOKEN_EMBEDDING
            found[id(weight)] = whole(role, tuple(weight.shape), "embedding: rows are tokens", in_axis=1)


def _output_layer(model: nn.Module, paths: dict[str, nn.Module], found: dict[int, Anatomy]) -> None:
    """The output layer: what transformers says, else the matrix that goes back to the vocabulary, else by name."""
    candidates: list[tuple[nn.Module, str]] = []
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter) and isinstance(output := getter(), nn.Module):
        candidates.append((output, "the model's get_output_embeddings()"))
    tables = {tuple(m.weight.shape) for m in paths.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for path, module in reversed(paths.items()):
        weight = stored(module) if is_dense(module) else None
        if weight is None or id(weight) in found:
            continue
        if role_of_name(f"{path}.weight") is Role.HEAD:
            candidates.append((module, "an output layer by name"))
        elif tuple(weight.shape) in tables and weight.shape[0] > weight.shape[1] and clean(path).count(".") <= 1:
            candidates.append((module, "has the shape of the token embedding, at the top of the model"))
    for module, why in candidates:
        weight = stored(module)
        if weight is not None and weight.ndim == 2 and id(weight) not in found:
            found[id(weight)] = rows(Role.HEAD)(Context(weight, module, [module]), f"output layer: {why}")


_FUSED_NAME = re.compile(r"(?i)(^|_)(qkv|wqkv|query_key_value|c_attn|kv|qk|to_kv|in_proj_qkv\w*|kv_proj|qk_proj)(_|$)")


def _leaf(context: Context, name: str, leaf: str, found: dict[int, Anatomy]) -> Anatomy:
    """A parameter no family claimed: by the module that holds it, then by name."""
    tensor, owner = context.tensor, context.owner
    meant, meant_leaf = parametrised(context, leaf)
    if stored(meant, meant_leaf) is tensor and meant_leaf != leaf:  # it stands for another tensor: what that one is
        path = name.removesuffix(f".parametrizations.{meant_leaf}.{leaf}").removesuffix(f".{leaf}")
        around = context.modules[2:] if meant is not owner else context.modules
        return _leaf(Context(tensor, meant, around), f"{path}.{meant_leaf}", meant_leaf, found)
    if is_dense(owner) and leaf == "weight" and tensor.ndim >= 2:
        role = role_of_name(name)
        holder = clean(name).rpartition(".")[0].rpartition(".")[2]  # empty where the model is the layer itself
        suspicious = role in HEAD_ROLES or _FUSED_NAME.search(holder)
        if suspicious or (role is not Role.ATTENTION_OUT and _inside_attention(context, found)):
            return _doubtful(context, name)
        chosen = role if role in (Role.ATTENTION_OUT, Role.MLP_OUT) else Role.MLP_IN
        return replace(
            rows(chosen)(context, f"a dense layer ({type(owner).__name__}): units are its outputs"), declared=False
        )
    bare = next((row for row in BARE if row.matches(context, leaf)), None)
    if bare is not None:
        return bare.make(context, bare.why)
    if tensor.ndim >= 2 and role_of_name(name) is Role.POSITION_EMBEDDING:
        return table_rows(Role.POSITION_EMBEDDING)(context, f"a position table by name {name!r}")
    if tensor.ndim <= 1:
        return by_name(name, context.shape)
    return whole(Role.OTHER, context.shape, f"{type(owner).__name__}.{leaf} is in no table")


def _inside_attention(context: Context, found: dict[int, Anatomy]) -> bool:
    """Whether the layer belongs to something that calls itself attention and whose projections nobody knows.

    Containers and modules around a single layer are no level: a list of projections is the attention's own. But where
    the queries, keys or values are known, what else a container holds is a feed-forward block beside them.
    """
    around = [module for module in context.modules[1:] if not _is_transparent(module)]
    if _says_attention(context.owner) or (around and around[0] is context.modules[1] and _says_attention(around[0])):
        return True
    if not around or not _says_attention(around[0]):
        return False
    roles = {part.role for p in around[0].parameters() if id(p) in found for part in found[id(p)].parts}
    return not roles & HEAD_ROLES


def _says_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _is_transparent(module: nn.Module) -> bool:
    """Whether a module is a container or wrapper, or has one layer inside and nothing else that learns but vectors."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or [*module._modules] == ["module"]:
        return True
    matrices = (p for p in module.parameters() if p.ndim >= 2)
    return not _says_attention(module) and len(list(islice(matrices, 2))) == 1


def _doubtful(context: Context, name: str) -> Anatomy:
    """A matrix inside an attention nobody declared: its rows might be anything."""
    around = (module for module in context.modules[1:] if not _is_transparent(module))
    kind = type(next(around, context.owner)).__name__
    why = f"inside {kind}, an attention no family describes ({clean(name)})"
    return replace(context.plain(Role.OTHER, why), declared=False)


# --- without a model in hand --------------------------------------------------------------------------------------


def tag(model: nn.Module) -> nn.Module:
    """Stamp each parameter with its anatomy, so that ``AdamMini(list_of_params)`` knows it.

    Returns:
        the model itself, for chaining.
    """
    parameters = dict(model.named_parameters())
    for name, anatomy in discover(model).items():
        if name in parameters:  # FSDP may have flattened it into another, which is stamped below
            setattr(parameters[name], _TAG, anatomy)
            setattr(parameters[name], _NAME_TAG, name)
    for wrapper in wrappers():
        wrapper.describe_model(model, discover)
    return model


def tagged(parameter: Tensor, shape: tuple[int, ...] | None = None) -> Anatomy | None:
    """The anatomy ``tag`` left on a parameter, if it still fits its shape (or the one it had before it was sharded)."""
    anatomy, shape = getattr(parameter, _TAG, None), whole_shape(parameter) if shape is None else shape
    return anatomy if isinstance(anatomy, Anatomy) and anatomy.shape == shape else None


def tagged_or_named(parameter: Tensor, name: str, shape: tuple[int, ...]) -> Anatomy:
    """The anatomy of a parameter whose model is not at hand: from its tag, else from its name."""
    return tagged(parameter, shape) or by_name(name, shape)


def tagged_name(parameter: Tensor) -> str:
    """The name ``tag`` left on a parameter, for the overrides of rules; empty where there is none."""
    return str(getattr(parameter, _NAME_TAG, "")) if tagged(parameter) is not None else ""


def module_behind(params: Any) -> nn.Module | None:
    """The model whose ``parameters()`` or ``named_parameters()`` this is, when it has not been consumed yet.

    Those methods are generators, and a generator that has not started still holds the module it will walk. Asking
    it keeps ``AdamMini(model.parameters())`` as exact as ``AdamMini(model)``.
    """
    frame = getattr(params, "gi_frame", None)
    owner = frame.f_locals.get("self") if frame is not None else None
    if not isinstance(owner, nn.Module):
        return None
    methods = (getattr(type(owner), name, None) for name in ("parameters", "named_parameters"))
    if any(getattr(method, "__code__", object()) is params.gi_code for method in methods):
        return owner
    return None  # somebody else's generator: its "self" means something else


def report_unknown(unknown: dict[str, Anatomy], unit: str, *, strict: bool) -> None:
    """Say once which matrices nobody recognised, and which vectors may be biases or norms.

    Raises:
        ValueError: with ``strict``, instead of the warning.
    """
    if vectors := [name for name, anatomy in unknown.items() if is_guessed_vector(anatomy)]:
        some = ", ".join(vectors[:8]) + (", ..." if vectors[8:] else "")
        logger.info("%d vector(s) may be biases or norms and get the unit of biases: %s", len(vectors), some)
    unknown = {name: anatomy for name, anatomy in unknown.items() if not is_guessed_vector(anatomy)}
    if not unknown:
        return
    listing = "; ".join(f"{name} {anatomy.shape} ({anatomy.reason})" for name, anatomy in list(unknown.items())[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    text = (
        f"{len(unknown)} weight(s) not recognised: {listing}{more}. What is not recognised gets the unit "
        f"of OTHER ({unit}), heads of unknown size a scalar per row. "
        "Pass the model itself (or tag(model) first), declare the family in optimizer/partition/families/, or "
        "choose another unit for OTHER in the rules"
    )
    if strict:
        raise ValueError(text)
    logger.warning(text)
