"""Roles guessed from parameter names, used only if no module determines what a parameter does."""

from __future__ import annotations

import re
from dataclasses import replace

from .roles import Anatomy, Part, Role, whole

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

# Each pattern must match a whole component of the dotted name, because substrings occur in unrelated names.
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
    """Return a parameter name without the prefixes of DDP, FSDP, torch.compile and activation checkpointing."""
    return _WRAPPERS.sub("", name)


def role_of_name(name: str) -> Role | None:
    """Return the role that a dotted parameter name suggests; None if it suggests none."""
    parts = clean(name).lower().split(".")
    leaf = parts[-1]
    if leaf.endswith("bias"):
        return Role.BIAS
    if leaf == "weight":
        parts = parts[:-1]
    # Only the tensors of a norm itself are norms: norm.weight and norm.scale are, norm.net.weight is not.
    norm_from = len(parts) - (1 if leaf == "weight" else 2)
    for i, part in reversed(list(enumerate(parts))):  # innermost first: blocks.0.attn.wq is a query
        for pattern, role in _TABLE:
            if re.fullmatch(pattern, part):
                return role
        if part == "c_proj":
            return Role.ATTENTION_OUT if any("attn" in p or "attention" in p for p in parts) else Role.MLP_OUT
        if i >= norm_from and _NORM.search(part):
            return Role.NORM
    if len(parts) <= 2 and parts and _TOP_HEAD.fullmatch(parts[-1]):
        return Role.HEAD
    return None


# Pickled anatomies contain this text, and ``is_guessed_vector`` compares with it: do not change it.
_GUESSED = "a vector without a telling name, a bias or a norm: its elements share nothing"


def is_guessed_vector(anatomy: Anatomy) -> bool:
    """Whether this is a vector whose name does not tell a bias from a norm."""
    return anatomy.reason == _GUESSED


def by_name(name: str, shape: tuple[int, ...], head_dim: int | None = None) -> Anatomy:
    """Return the anatomy of a parameter from its name and shape alone.

    Vectors are biases or norms. A vector that may be either is a bias, because the elements of biases share nothing,
    which is the finer choice. Matrices are (out, in); a name never makes a matrix a norm. Matrices without a
    recognised name, and tensors of more dimensions other than biases and position tables, have the role OTHER.
    ``declared`` is False.

    Args:
        name: dotted parameter name.
        shape: the parameter's shape.
        head_dim: rows per attention head of a query, key or value; None if unknown.
    """
    return replace(_by_name(name, shape, head_dim), declared=False)


def _by_name(name: str, shape: tuple[int, ...], head_dim: int | None) -> Anatomy:
    role = role_of_name(name)
    reason = f"by name {name!r}"
    if len(shape) <= 1:
        if role is None and name.rpartition(".")[2] == "weight":
            return whole(Role.NORM, shape, "a layer's weight with one dimension: the scale of a norm")
        return whole(role, shape, reason) if role in (Role.BIAS, Role.NORM) else whole(Role.BIAS, shape, _GUESSED)
    if role is Role.BIAS:
        return whole(role, shape, reason, axis=len(shape) - 1)
    if role is Role.POSITION_EMBEDDING:
        return whole(role, shape, reason, axis=len(shape) - 2, in_axis=len(shape) - 1)
    if role in (None, Role.NORM) or len(shape) != 2:
        return whole(Role.OTHER, shape, f"the role is unknown from name {name!r} and shape {shape}")
    part = Part(role, shape[0], head_dim if role in (Role.QUERY, Role.KEY, Role.VALUE) else None)
    return Anatomy(shape, (part,), reason, axis=0, in_axis=1)
