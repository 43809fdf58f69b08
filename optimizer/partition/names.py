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
    leaf = parts[-1]
    if leaf.endswith("bias"):
        return Role.BIAS
    if leaf == "weight":
        parts = parts[:-1]
    near = len(parts) - (
        1 if leaf == "weight" else 2
    )  # a norm's own tensors: norm.weight, norm.scale, not norm.net.weight
    for i, part in reversed(list(enumerate(parts))):  # innermost first: blocks.0.attn.wq is a query, not an attention
        for pattern, role in _TABLE:
            if re.fullmatch(pattern, part):
                return role
        if part == "c_proj":
            return Role.ATTENTION_OUT if any("attn" in p or "attention" in p for p in parts) else Role.MLP_OUT
        if i >= near and _NORM.search(part):
            return Role.NORM
    if len(parts) <= 2 and parts and _TOP_HEAD.fullmatch(parts[-1]):
        return Role.HEAD
    return None


_GUESSED = "a vector without a telling name, a bias or a norm: its elements share nothing"


def is_guessed_vector(anatomy: Anatomy) -> bool:
    """Whether this is a vector that may be a bias or a norm, as far as anybody knows."""
    return anatomy.reason == _GUESSED


def by_name(name: str, shape: tuple[int, ...], head_dim: int | None = None) -> Anatomy:
    """The anatomy of a parameter of which only its name and shape are known.

    Vectors are biases or norms. One that may be either counts as a bias, which shares nothing: the finer choice.
    Matrices are taken as (out, in); a name alone makes none a norm. Anything else, or a matrix with a name that says
    nothing, is OTHER. No family declared any of it.
    """
    return replace(_by_name(name, shape, head_dim), declared=False)


def _by_name(name: str, shape: tuple[int, ...], head_dim: int | None) -> Anatomy:
    role = role_of_name(name)
    reason = f"by name {name!r}"
    if len(shape) <= 1:
        if role is None and name.rpartition(".")[2] == "weight":
            return whole(Role.NORM, shape, "a layer's weight with one dimension: a norm's")
        return whole(role, shape, reason) if role in (Role.BIAS, Role.NORM) else whole(Role.BIAS, shape, _GUESSED)
    if role is Role.BIAS:
        return whole(role, shape, reason, axis=len(shape) - 1)
    if role is Role.POSITION_EMBEDDING:
        return whole(role, shape, reason, axis=len(shape) - 2, in_axis=len(shape) - 1)
    if role in (None, Role.NORM) or len(shape) != 2:
        return whole(Role.OTHER, shape, f"name {name!r} and shape {shape} say nothing")
    part = Part(role, shape[0], head_dim if role in (Role.QUERY, Role.KEY, Role.VALUE) else None)
    return Anatomy(shape, (part,), reason, axis=0, in_axis=1)
