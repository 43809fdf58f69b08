"""Roles from names: the last resort, where no module says what a parameter does."""

from __future__ import annotations

import re
from dataclasses import replace

from .roles import Anatomy, Part, Role, whole

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

# Matched against whole components of the dotted name, never against substrings of a component.
_TABLE: tuple[tuple[str, Role], ...] = (
    (
        r"(wpe|position_embeddings?|embed_positions|pos_embed\w*|pos_emb|positional_embedding)",
        Role.POSITION_EMBEDDING,
    ),
    (
        r"(wte|tok_embeddings?|embed_tokens|word_embeddings|embeddings?|embd|embed|embed_in)",
        Role.TOKEN_EMBEDDING,
    ),
    (r"(lm_head|embed_out|unembed\w*|to_logits|output_projection)", Role.HEAD),
    (r"(q_proj|wq|query|q_lin|to_q|q_attn|q_proj_weight)", Role.QUERY),
    (r"(k_proj|wk|key|k_lin|to_k|k_proj_weight)", Role.KEY),
    (r"(v_proj|wv|value|v_lin|to_v|v_proj_weight)", Role.VALUE),
    (r"(o_proj|wo|out_proj)", Role.ATTENTION_OUT),
    (r"(w1|w3|gate_proj|up_proj|c_fc|fc1|linear1|fc_in)", Role.MLP_IN),
    (r"(w2|down_proj|fc2|linear2|fc_out)", Role.MLP_OUT),
)
_NORM = re.compile(r"(^|_)(ln|norm|layernorm|rmsnorm)(_|\d|$)|norm$")
_TOP_HEAD = re.compile(r"(output|head|classifier|score)")


def clean(name: str) -> str:
    """The name without the prefixes that DDP, FSDP, torch.compile and activation checkpointing put in."""
    return _WRAPPERS.sub("", name)


def role_of_name(name: str) -> Role | None:
    """The role a dotted parameter name speaks of, or None."""
    parts = clean(name).lower().split(".")
    if parts[-1].endswith("bias"):
        return Role.BIAS
    if parts[-1] == "weight":
        parts = parts[:-1]
    for part in reversed(parts):  # innermost first: blocks.0.attn.wq is a query, not an attention
        for pattern, role in _TABLE:
            if re.fullmatch(pattern, part):
                return role
        if part == "c_proj":
            return Role.ATTENTION_OUT if any("attn" in p or "attention" in p for p in parts) else Role.MLP_OUT
        if _NORM.search(part):
            return Role.NORM
    if len(parts) <= 2 and parts and _TOP_HEAD.fullmatch(parts[-1]):
        return Role.HEAD
    return None


def by_name(name: str, shape: tuple[int, ...], head_dim: int | None = None) -> Anatomy:
    """The anatomy of a parameter of which only its name and shape are known.

    Vectors are biases or norms; matrices are taken as (out, in). Anything else, or a matrix with a name that says
    nothing, is OTHER. No family declared any of it.
    """
    return replace(_by_name(name, shape, head_dim), declared=False)


def _by_name(name: str, shape: tuple[int, ...], head_dim: int | None) -> Anatomy:
    role = role_of_name(name)
    reason = f"by name {name!r}"
    if len(shape) <= 1:
        vector_role = role if role in (Role.BIAS, Role.NORM) else Role.NORM if name.endswith("weight") else Role.OTHER
        return whole(vector_role, shape, reason if role else "a vector without a telling name")
    if role in (Role.BIAS, Role.NORM):
        return whole(role, shape, reason, axis=len(shape) - 1)
    if role is Role.POSITION_EMBEDDING:
        return whole(role, shape, reason, axis=len(shape) - 2, in_axis=len(shape) - 1)
    if role is None or len(shape) != 2:
        return whole(Role.OTHER, shape, f"name {name!r} and shape {shape} say nothing")
    part = Part(role, shape[0], head_dim if role in (Role.QUERY, Role.KEY, Role.VALUE) else None)
    return Anatomy(shape, (part,), reason, axis=0, in_axis=1)
