"""Makers: how a tensor is made, in the words the table of families is written in."""

from __future__ import annotations

from collections.abc import Sequence

from ..heads import fused_heads, head_dim_of
from ..roles import Anatomy, Part, Role, whole
from .table import Context, Maker

Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
Size = str | int
"""Units of a part: a number, or the attribute of the module or its configuration that says it."""


def rows(role: Role) -> Maker:
    """A matrix whose output units stand for themselves."""

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
    """A query, key or value projection of its own: output units are (head, head_dim).

    Args:
        role: QUERY, KEY or VALUE.
        query: where the query projection is, whose rows over the number of heads give head_dim.
        key: where the key projection is, whose number of heads is the value's, whatever the value's head_dim.
        dim: attributes that say head_dim outright; then nothing else is asked.
        shared: whether the units do a second thing too (``Part.shared``).
    """

    def make(context: Context, why: str) -> Anatomy:
        size = context.outputs
        if dim:
            head_dim: int | None = context.ask(*dim)
        else:
            into = context.frame[2]
            width = context.shape[into] if into is not None else None
            head_dim = head_dim_of(context.modules, context.rows_of(query) or size, width)
        key_rows = context.rows_of(key) if role is V and not dim else None
        if key_rows and head_dim:
            kv_heads = max(1, key_rows // head_dim)
            head_dim = size // kv_heads if size % kv_heads == 0 else None
        return context.anatomy((Part(role, size, head_dim, shared),), why)

    return make


def one_head(role: Role, *, shared: bool = False) -> Maker:
    """A projection for the only head there is."""

    def make(context: Context, why: str) -> Anatomy:
        return context.anatomy((Part(role, context.outputs, context.outputs, shared),), why)

    return make


def per_slice(role: Role) -> Maker:
    """(in, head, head_dim), used by einsum: a head is a slice of axis 1."""

    def make(context: Context, why: str) -> Anatomy:
        return Anatomy(context.shape, (Part(role, context.shape[1], 1),), why, axis=1, in_axis=0)

    return make


def same_heads(role: Role) -> Maker:
    """A projection with the number of heads its module has, whatever the width of a head."""

    def make(context: Context, why: str) -> Anatomy:
        n_heads = context.ask("num_attention_heads", "num_heads", "n_heads")
        if context.outputs % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {context.outputs} units")
        return context.anatomy((Part(role, context.outputs, context.outputs // n_heads),), why)

    return make


def table_first(role: Role) -> Maker:
    """Output units along axis 0, whatever comes behind."""

    def make(context: Context, why: str) -> Anatomy:
        return whole(role, context.shape, why)

    return make


def stacked(*order: Role) -> Maker:
    """[Q|K|V] (or [K|V], or any order) one after the other along the output axis."""

    def make(context: Context, why: str) -> Anatomy:
        size = context.outputs
        if Q not in order:  # [K|V] beside a query projection, or of cross attention: halves
            half = size // len(order)
            head_dim = head_dim_of(context.modules, context.rows_of(("q_proj", "to_q", "query", "q_attn", "q")) or half)
            return context.anatomy([Part(role, half, head_dim) for role in order], why)
        found = fused_heads(context.modules, size)
        if found is None:
            return context.plain(Role.OTHER, f"{why}; but no number of heads was found")
        n_heads, n_kv_heads, head_dim = found
        sizes = {role: (n_heads if role is Q else n_kv_heads) * head_dim for role in order}
        return context.anatomy([Part(role, sizes[role], head_dim) for role in order], why)

    return make


def per_head(*parts: tuple[Role, Size], heads: Sequence[str] = ()) -> Maker:
    """The same sequence of parts for every head, for example (Q, K, V), or MLA's (key, value).

    Args:
        parts: (role, units of one head).
        heads: attributes that say how many heads there are, checked against the tensor.
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
        made = [Part(role, n, n if role in (Q, K, V) else None) for (role, _), n in zip(parts, sizes, strict=True)]
        return context.anatomy(made, why, repeat=repeat)

    return make


def thirds_per_head(*order: Role) -> Maker:
    """(head, 3, head_dim): the three parts of a head lie together."""

    def make(context: Context, why: str) -> Anatomy:
        n_heads = context.ask("num_heads", "num_attention_heads", "n_head")
        if context.outputs % (3 * n_heads):
            raise ValueError(f"{n_heads} heads of three parts do not divide {context.outputs} units")
        head_dim = context.outputs // (3 * n_heads)
        return context.anatomy([Part(role, head_dim, head_dim) for role in order], why, repeat=n_heads)

    return make


def per_group(context: Context, why: str) -> Anatomy:
    """(kv group, queries of the group + 2, head_dim): each group's queries, then its key, then its value."""
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
    """Parts of stated sizes one after the other; one size may be "..." for the rest.

    Args:
        parts: (role, units, units of a head or None).
    """

    def make(context: Context, why: str) -> Anatomy:
        sizes = [n if isinstance(n, int) else None if n == "..." else context.ask(n) for _, n, _ in parts]
        known = sum(n for n in sizes if n is not None)
        made = []
        for (role, _, dim), n in zip(parts, sizes, strict=True):
            head_dim = context.ask(dim) if isinstance(dim, str) else dim
            made.append(Part(role, context.outputs - known if n is None else n, head_dim))
        return context.anatomy(made, why)

    return make


def vector(role: Role) -> Maker:
    """A tensor without an input axis: norms, biases."""

    def make(context: Context, why: str) -> Anatomy:
        return whole(role, context.shape, why, axis=max(context.tensor.ndim - 1, 0))

    return make


def table_rows(role: Role) -> Maker:
    """A bare table [..., rows, features] that is looked up or broadcast: one unit per row."""

    def make(context: Context, why: str) -> Anatomy:
        ndim = context.tensor.ndim
        if ndim < 2:
            return whole(role, context.shape, why)
        lead = tuple(size for size in context.shape[: ndim - 2])
        return Anatomy(context.shape, (Part(role, context.shape[-2]),), why, axis=ndim - 2, in_axis=ndim - 1,
                       leading=0 if all(size == 1 for size in lead) else ndim - 2)  # fmt: skip

    return make


def kernel(context: Context, why: str) -> Anatomy:
    """A convolution kernel; the transposed ones keep (in, out / groups), so that groups fold into axis 0."""
    shape, owner = context.shape, context.owner
    if not getattr(owner, "transposed", False):
        return Anatomy(shape, (Part(Role.CONV, shape[0]),), why, axis=0, in_axis=1)
    groups = int(getattr(owner, "groups", 1))
    if groups == 1:
        return Anatomy(shape, (Part(Role.CONV, shape[1]),), why, axis=1, in_axis=0)
    return Anatomy(shape, (Part(Role.CONV, shape[1]),), why, axis=2, in_axis=1, leading=1, fold=groups)
