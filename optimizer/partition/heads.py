"""How many attention heads a module has, asked of the module first and of the configurations around it after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_HEAD_DIM = ("head_dim", "d_head", "dim_head", "attention_head_size", "head_size", "d_kv", "key_value_proj_dim",
             "attn_head_size", "hidden_size_per_attention_head")  # fmt: skip
_HEADS = ("n_heads", "n_head", "num_heads", "num_attention_heads", "num_attn_heads", "n_local_heads", "nhead", "heads",
          "nheads")  # fmt: skip
_KV_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "n_kv_head", "n_local_kv_heads", "kv_heads",
             "n_query_groups", "num_query_groups", "num_gqa_groups")  # fmt: skip
_CONFIGS = ("config", "cfg", "args", "params", "model_args", "hparams")


def _integer(source: Any, names: Sequence[str]) -> int | None:
    """The first of the named attributes (or keys) that holds a positive integer."""
    for name in names:
        value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def sources(modules: Sequence[Any]) -> Iterator[Any]:
    """A module, its configurations, then its ancestors' (innermost first)."""
    for module in modules:
        yield module
        for name in _CONFIGS:
            config = getattr(module, name, None)
            if config is not None:
                yield config


def ask(modules: Sequence[Any], names: Sequence[str]) -> int | None:
    """The first of the named positive integers that the nearest source has, or None."""
    return next((n for source in sources(modules) if (n := _integer(source, names)) is not None), None)


def head_dim_of(modules: Sequence[Any], query_rows: int, width: int | None = None) -> int | None:
    """Rows per attention head of a query projection with ``query_rows`` rows.

    The nearest source that knows ``head_dim`` or a number of heads decides; a source that knows both must agree
    with the tensor.

    Args:
        modules: the attention module, then its ancestors, innermost first.
        query_rows: rows of the query projection.
        width: what the query projection takes in. Where a module around this one counts heads that together are as
            wide, this one is one of them (a ``ModuleList`` of single heads).

    Raises:
        ValueError: the nearest source contradicts the number of rows.
    """
    for source in sources(modules):
        head_dim, heads = _integer(source, _HEAD_DIM), _integer(source, _HEADS)
        if head_dim is None and heads is None:
            continue
        where = type(source).__name__
        if heads is not None and width == heads * query_rows != query_rows and not _speaks_of(modules[0], source):
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


def _speaks_of(module: Any, source: Any) -> bool:
    """Whether a source is the module or a configuration it holds, rather than something further out."""
    return source is module or any(getattr(module, name, None) is source for name in _CONFIGS)


def fused_heads(modules: Sequence[Any], rows: int) -> tuple[int, int, int] | None:
    """(query heads, key-value heads, head_dim) of a fused [Q|K|V] projection with ``rows`` rows, or None.

    The nearest source that knows the number of heads decides. Key-value heads it does not know are looked for around
    it; where those do not explain the rows (they belong to other modules), every query head has a key.

    Raises:
        ValueError: the nearest source that knows the heads contradicts the number of rows.
    """
    for source in sources(modules):
        heads = _integer(source, _HEADS)
        if heads is None:
            continue
        head_dim = _integer(source, _HEAD_DIM)
        candidates = (_integer(source, _KV_HEADS), ask(modules, _KV_HEADS), heads)
        for kv_heads in dict.fromkeys(n for n in candidates if n is not None):
            fitted = head_dim or rows // (heads + 2 * kv_heads)
            if (heads + 2 * kv_heads) * fitted == rows:
                return heads, kv_heads, fitted
        left, rest = divmod(rows - heads * head_dim, 2 * head_dim) if head_dim else (0, 1)
        if candidates[:2] == (None, None) and not rest and left > 0 and heads % left == 0:
            return heads, left, head_dim or 0  # nobody speaks of key-value heads; the rows that are left are theirs
        raise ValueError(
            f"{type(source).__name__} says {heads} query and {kv_heads} key-value heads of head_dim={fitted} "
            f"({(heads + 2 * kv_heads) * fitted} rows), but the fused projection has {rows} rows; set head_dim, and "
            "n_kv_heads (num_key_value_heads) where keys and values have fewer heads, on the module or its config"
        )
    return None
