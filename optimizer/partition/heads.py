"""The number and size of attention heads, read from a module and from the configurations of its ancestors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Unformatted, because lists of names are easier to read in a block than one name per line.
_HEAD_DIM = ("head_dim", "d_head", "dim_head", "attention_head_size", "head_size", "d_kv", "key_value_proj_dim",
             "attn_head_size", "hidden_size_per_attention_head")  # fmt: skip
_HEADS = ("n_heads", "n_head", "num_heads", "num_attention_heads", "num_attn_heads", "n_local_heads", "nhead", "heads",
          "nheads")  # fmt: skip
_KV_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "n_kv_head", "n_local_kv_heads", "kv_heads",
             "n_query_groups", "num_query_groups", "num_gqa_groups")  # fmt: skip
_CONFIGS = ("config", "cfg", "args", "params", "model_args", "hparams")


def _integer(source: Any, names: Sequence[str]) -> int | None:
    """Return the first of the named attributes (or keys) that is a positive integer; None if there is none."""
    for name in names:
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def sources(modules: Sequence[Any]) -> Iterator[Any]:
    """Yield each module, followed by its configurations, in the order of ``modules`` (innermost first)."""
    for module in modules:
        yield module
        for name in _CONFIGS:
            config = getattr(module, name, None)
            if config is not None:
                yield config


def ask(modules: Sequence[Any], names: Sequence[str]) -> int | None:
    """Return the first of the named positive integers that the nearest module or configuration has; None without one.

    Args:
        modules: a module, then its ancestors, innermost first.
        names: attribute names, in order of preference.
    """
    return next((n for source in sources(modules) if (n := _integer(source, names)) is not None), None)


def head_dim_of(modules: Sequence[Any], query_rows: int, width: int | None = None) -> int | None:
    """Return the number of rows per attention head of a query projection; None if it is unknown.

    The nearest module or configuration that has ``head_dim`` or a number of heads decides. If it has both, they must
    agree with the tensor.

    Args:
        modules: the attention module, then its ancestors, innermost first.
        query_rows: number of rows of the query projection.
        width: number of input features of the query projection; None if unknown. If an ancestor has so many heads
            that heads of ``query_rows`` rows fill this width, the module is a single head (of a ``ModuleList``).

    Raises:
        ValueError: the nearest module or configuration contradicts the number of rows.
    """
    for source in sources(modules):
        head_dim, heads = _integer(source, _HEAD_DIM), _integer(source, _HEADS)
        if head_dim is None and heads is None:
            continue
        where = type(source).__name__
        if heads is not None and width == heads * query_rows != query_rows and not _belongs_to(modules[0], source):
            return query_rows
        if head_dim is None:
            assert heads is not None
            if query_rows % heads:
                raise ValueError(
                    f"{where} says {heads} heads, which do not divide the query projection's {query_rows} rows"
                )
            return query_rows // heads
        if heads is not None and heads * head_dim != query_rows:
            raise ValueError(
                f"{where} says {heads} heads of head_dim={head_dim} ({heads * head_dim} rows), but the query "
                f"projection has {query_rows} rows"
            )
        if query_rows % head_dim:
            raise ValueError(
                f"{where} says head_dim={head_dim}, which does not divide the query projection's {query_rows} rows"
            )
        return head_dim
    return None


def _belongs_to(module: Any, source: Any) -> bool:
    """Whether ``source`` is the module or one of its own configurations, and not an ancestor's."""
    return source is module or any(getattr(module, name, None) is source for name in _CONFIGS)


def fused_heads(modules: Sequence[Any], rows: int) -> tuple[int, int, int] | None:
    """Return (query heads, key-value heads, head_dim) of a fused [Q|K|V] projection; None if they are unknown.

    The nearest module or configuration that has the number of heads decides. If it has no number of key-value heads,
    the ancestors are searched for one. If that number does not explain the rows, because it belongs to another
    module, every query head has a key and a value of its own.

    Args:
        modules: the attention module, then its ancestors, innermost first.
        rows: number of rows of the projection.

    Raises:
        ValueError: the nearest module or configuration that has the number of heads contradicts the number of rows.
    """
    for source in sources(modules):
        heads = _integer(source, _HEADS)
        if heads is None:
            continue
        head_dim = _integer(source, _HEAD_DIM)
        candidates = (_integer(source, _KV_HEADS), ask(modules, _KV_HEADS), heads)
        for kv_heads in dict.fromkeys(n for n in candidates if n is not None):
            fitted_dim = head_dim or rows // (heads + 2 * kv_heads)
            if (heads + 2 * kv_heads) * fitted_dim == rows:
                return heads, kv_heads, fitted_dim
        remaining_heads, rest = divmod(rows - heads * head_dim, 2 * head_dim) if head_dim else (0, 1)
        if candidates[:2] == (None, None) and not rest and remaining_heads > 0 and heads % remaining_heads == 0:
            # No module has a number of key-value heads, so the rows that are not queries determine it.
            return heads, remaining_heads, head_dim or 0
        raise ValueError(
            f"{type(source).__name__} says {heads} query and {kv_heads} key-value heads of head_dim={fitted_dim} "
            f"({(heads + 2 * kv_heads) * fitted_dim} rows), but the fused projection has {rows} rows; set head_dim on "
            "the module or its config, and n_kv_heads (num_key_value_heads) if keys and values have fewer heads"
        )
    return None
