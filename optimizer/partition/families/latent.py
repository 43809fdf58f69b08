"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are computed from a low-rank latent."""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import K, Q, V, heads, one_head, rows
from .table import Context, Family, Maker


def _dims(context: Context) -> tuple[int, int, int, int]:
    """Return the number of heads, and the units per head without rotary positions, with them, and of the value."""
    return (
        context.ask("num_heads", "n_heads", "num_attention_heads", "n_head"),
        context.number("qk_nope_head_dim"),
        context.number("qk_rope_head_dim"),  # zero in layers without rotary positions
        context.number("v_head_dim"),
    )


def queries(context: Context, why: str) -> Anatomy:
    """Describe queries, (head, [nope|rope]): the two parts together form one head."""
    n_heads, nope, rope, _ = _dims(context)
    return _checked(context, why, (Part(Q, nope + rope, nope + rope),), n_heads)


def gated_queries(context: Context, why: str) -> Anatomy:
    """Describe queries with a gate, (head, [nope|rope|gate])."""
    n_heads, nope, rope, value = _dims(context)
    return _checked(context, why, (Part(Q, nope + rope, nope + rope), Part(Role.MLP_IN, value)), n_heads)


def keys_values(context: Context, why: str) -> Anatomy:
    """Describe the projection from the latent to keys and values, (head, [k_nope|v])."""
    n_heads, nope, _, value = _dims(context)
    return _checked(context, why, (Part(K, nope, nope), Part(V, value, value)), n_heads)


def latent_and_rope(context: Context, why: str) -> Anatomy:
    """Describe [latent|rope]: latent units are independent; the rotary units form one key that all heads share."""
    rope = context.number("qk_rope_head_dim")
    latent = Part(Role.MLP_IN, context.outputs - rope)
    return context.anatomy((latent, Part(K, rope, rope)) if rope else (latent,), why)


def _checked(context: Context, why: str, parts: tuple[Part, ...], n_heads: int) -> Anatomy:
    """Repeat the parts for every head; raise ValueError if they do not fill the output axis."""
    size = sum(part.size for part in parts)
    if size * n_heads != context.outputs:
        raise ValueError(
            f"{type(context.modules[0]).__name__} says {n_heads} heads of {size} units ({n_heads * size}), but the "
            f"weight has {context.outputs}"
        )
    return context.anatomy(parts, why, repeat=n_heads)


_WHY = "multi-head latent attention"
_PARAMS: dict[str, Maker] = {
    "q_a_proj": rows(Role.MLP_IN),
    "q_b_proj": queries,
    "q_proj": queries,
    "q_gate_proj": gated_queries,
    "kv_a_proj_with_mqa": latent_and_rope,
    "kv_b_proj": keys_values,
    "o_proj": rows(Role.ATTENTION_OUT),
    "proj": rows(Role.ATTENTION_OUT),
    "gate_proj": rows(Role.MLP_IN),
    "g_proj": rows(Role.MLP_IN),
}

LATENT: tuple[Family, ...] = (
    Family(children=("kv_a_proj_with_mqa", "kv_b_proj"), why=_WHY, params=_PARAMS),
    Family(
        children=("wkv_a", "wkv_b", "wo"),
        why=f"{_WHY}, with the names of torchtitan and DeepSeek",
        params={
            "wq": queries,
            "wq_a": rows(Role.MLP_IN),
            "wq_b": queries,
            "wkv_a": latent_and_rope,
            "wkv_b": keys_values,
            "wo": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("DeepseekV4Attention",),
        library="transformers",
        why="DeepSeek-V4: low-rank queries; one projection is both key and value of the only key-value head",
        params={
            "q_a_proj": rows(Role.MLP_IN),
            "q_b_proj": heads(Q, dim=("head_dim",)),
            "kv_proj": one_head(V, shared=True),
            "o_a_proj": rows(Role.ATTENTION_OUT),
            "o_b_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("DeepseekV4HCACompressor", "DeepseekV4CSACompressor", "DeepseekV4Indexer"),
        library="transformers",
        why="DeepSeek-V4 compressor: one projection is both key and value",
        params={
            "kv_proj": one_head(V, shared=True),
            "gate_proj": rows(Role.MLP_IN),
            "weights_proj": rows(Role.MLP_IN),
            "q_b_proj": heads(Q, dim=("head_dim",)),
        },
    ),
)
