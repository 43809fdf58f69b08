"""Makers: the functions that the table of families uses to describe tensors.

A maker takes the context of a parameter and the reason to show, and returns the parameter's anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..heads import fused_heads, head_dim_of
from ..roles import Anatomy, Part, Role, whole
from .table import Context, Maker

Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
Size = str | int
"""The number of units of a part, or the name of the attribute of the module or its configuration that has it."""


def rows(role: Role) -> Maker:
    """Describe a matrix whose output units are independent of each other."""

    def make(context: Context, why: str) -> Anatomy:
        return context.plain(role, why)

    return make


def heads(
    role: Role,
    *,
    query: Sequence[str] = (),
    key: Sequence[str] = (),
    dim: Sequence[str] = (),
    shared: bool = False,
) -> Maker:
    """Describe a separate query, key or value projection, whose output units are (head, head_dim).

    Args:
        role: QUERY, KEY or VALUE.
        query: possible paths of the query projection; head_dim is its number of rows divided by the number of heads.
        key: possible paths of the key projection; a value projection has as many heads, but may have another head_dim.
        dim: names of attributes that contain head_dim; if given, nothing else is used.
        shared: whether the units have a second role (``Part.shared``).
    """

    def make(context: Context, why: str) -> Anatomy:
        size = context.outputs
        if dim:
            head_dim: int | None = context.ask(*dim)
        else:
            in_axis = context.frame[2]
            width = context.shape[in_axis] if in_axis is not None else None
            head_dim = head_dim_of(context.modules, context.rows_of(query) or size, width)
        key_rows = context.rows_of(key) if role is V and not dim else None
        if key_rows and head_dim:
            kv_heads = max(1, key_rows // head_dim)
            head_dim = size // kv_heads if size % kv_heads == 0 else None
        return context.anatomy((Part(role, size, head_dim, shared),), why)

    return make


def one_head(role: Role, *, shared: bool = False) -> Maker:
    """Describe the projection of an attention with a single head."""

    def make(context: Context, why: str) -> Anatomy:
        return context.anatomy((Part(role, context.outputs, context.outputs, shared),), why)

    return make


def per_slice(role: Role) -> Maker:
    """Describe a tensor (in, head, head_dim) that is used with einsum: a head is one index of axis 1."""

    def make(context: Context, why: str) -> Anatomy:
        return Anatomy(context.shape, (Part(role, context.shape[1], 1),), why, axis=1, in_axis=0)

    return make


def same_heads(role: Role) -> Maker:
    """Describe a projection that has as many heads as its module, but may have another head_dim."""

    def make(context: Context, why: str) -> Anatomy:
        n_heads = context.ask("num_attention_heads", "num_heads", "n_heads")
        if context.outputs % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {context.outputs} units")
        return context.anatomy((Part(role, context.outputs, context.outputs // n_heads),), why)

    return make


def table_first(role: Role) -> Maker:
    """Describe a tensor whose output units lie along axis 0, regardless of its other axes."""

    def make(context: Context, why: str) -> Anatomy:
        return whole(role, context.shape, why)

    return make


def stacked(*order: Role) -> Maker:
    """Describe projections that are concatenated along the output axis, for example [Q|K|V].

    Args:
        order: the roles in order. Without QUERY, all parts have the same size.
    """

    def make(context: Context, why: str) -> Anatomy:
        size = context.outputs
        if Q not in order:  # keys and values have equally many heads
            half = size // len(order)
            head_dim = head_dim_of(context.modules, context.rows_of(("q_proj", "to_q", "query", "q_attn", "q")) or half)
            return context.anatomy([Part(role, half, head_dim) for role in order], why)
        fused = fused_heads(context.modules, size)
        if fused is None:
            return context.plain(Role.OTHER, f"{why}; but no number of heads was found")
        n_heads, n_kv_heads, head_dim = fused
        sizes = {role: (n_heads if role is Q else n_kv_heads) * head_dim for role in order}
        return context.anatomy([Part(role, sizes[role], head_dim) for role in order], why)

    return make


def per_head(*parts: tuple[Role, Size], heads: Sequence[str] = ()) -> Maker:
    """Describe a tensor with the same sequence of parts for every head, for example (query, key, value).

    Args:
        parts: (role, number of units per head).
        heads: names of attributes that contain the number of heads, which is checked against the tensor; if empty,
            the number follows from the tensor's shape.
    """

    def make(context: Context, why: str) -> Anatomy:
        sizes = [n if isinstance(n, int) else context.ask(n) for _, n in parts]
        repeat, rest = divmod(context.outputs, sum(sizes))
        expected = context.ask(*heads) if heads else repeat
        if rest or repeat != expected:
            raise ValueError(
                f"{type(context.modules[0]).__name__} says {expected} heads of {sizes} units "
                f"({expected * sum(sizes)}), but the weight has {context.outputs}"
            )
        sized = [Part(role, n, n if role in (Q, K, V) else None) for (role, _), n in zip(parts, sizes, strict=True)]
        return context.anatomy(sized, why, repeat=repeat)

    return make


def thirds_per_head(*order: Role) -> Maker:
    """Describe a tensor (head, 3, head_dim): the three parts of each head are adjacent."""

    def make(context: Context, why: str) -> Anatomy:
        n_heads = context.ask("num_heads", "num_attention_heads", "n_head")
        if context.outputs % (3 * n_heads):
            raise ValueError(f"{n_heads} heads of three parts do not divide {context.outputs} units")
        head_dim = context.outputs // (3 * n_heads)
        return context.anatomy([Part(role, head_dim, head_dim) for role in order], why, repeat=n_heads)

    return make


def per_group(context: Context, why: str) -> Anatomy:
    """Describe a tensor (kv group, queries + 2, head_dim): the queries of each group, then its key and its value."""
    n_heads = context.ask("num_heads", "num_attention_heads", "n_head", "n_heads")
    groups = context.ask(
        "num_kv_heads", "num_key_value_heads", "num_query_groups", "n_query_groups", "n_kv_heads", "num_gqa_groups"
    )
    head_dim, rest = divmod(context.outputs, n_heads + 2 * groups)
    if rest or n_heads % groups:
        raise ValueError(f"{n_heads} query and {groups} key-value heads do not divide {context.outputs} units")
    parts = (Part(Q, n_heads // groups * head_dim, head_dim), Part(K, head_dim, head_dim), Part(V, head_dim, head_dim))
    return context.anatomy(parts, why, repeat=groups)


def segments(*parts: tuple[Role, Size, Size | None]) -> Maker:
    """Describe parts of given sizes that are concatenated along the output axis.

    Args:
        parts: (role, number of units, units per head or None). One number may be "..." for all remaining units.
    """

    def make(context: Context, why: str) -> Anatomy:
        sizes = [n if isinstance(n, int) else None if n == "..." else context.ask(n) for _, n, _ in parts]
        specified = sum(n for n in sizes if n is not None)
        sized = []
        for (role, _, dim), n in zip(parts, sizes, strict=True):
            head_dim = context.ask(dim) if isinstance(dim, str) else dim
            sized.append(Part(role, context.outputs - specified if n is None else n, head_dim))
        return context.anatomy(sized, why)

    return make


def vector(role: Role) -> Maker:
    """Describe a tensor without an input axis: a norm or a bias."""

    def make(context: Context, why: str) -> Anatomy:
        return whole(role, context.shape, why, axis=max(context.tensor.ndim - 1, 0))

    return make


def table_rows(role: Role) -> Maker:
    """Describe a bare table [..., rows, features] that is indexed or broadcast: one unit per row."""

    def make(context: Context, why: str) -> Anatomy:
        ndim = context.tensor.ndim
        if ndim < 2:
            return whole(role, context.shape, why)
        leading = 0 if all(size == 1 for size in context.shape[: ndim - 2]) else ndim - 2
        part = Part(role, context.shape[-2])
        return Anatomy(context.shape, (part,), why, axis=ndim - 2, in_axis=ndim - 1, leading=leading)

    return make


def kernel(context: Context, why: str) -> Anatomy:
    """Describe a convolution kernel; a transposed convolution is (in, out / groups), with groups along axis 0."""
    shape, owner = context.shape, context.owner
    if not getattr(owner, "transposed", False):
        return Anatomy(shape, (Part(Role.CONV, shape[0]),), why, axis=0, in_axis=1)
    groups = int(getattr(owner, "groups", 1))
    if groups == 1:
        return Anatomy(shape, (Part(Role.CONV, shape[1]),), why, axis=1, in_axis=0)
    return Anatomy(shape, (Part(Role.CONV, shape[1]),), why, axis=2, in_axis=1, leading=1, fold=groups)
