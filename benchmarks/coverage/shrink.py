"""Shrink configurations of transformers: every width is divided by the same number, so that proportions stay equal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_WIDTH = re.compile(
    r"(hidden_size|d_model|n_embd|^dim$|hidden_dim|intermediate|ffn_dim|ffn_hidden|d_ff|n_inner|head_dim|head_size|d_kv|"
    r"d_head|lora_rank|embed_dim|embedding_size|proj_dim|projection_dim|hidden_sizes|embed_dims|key_value_proj|"
    r"kv_channels|channels?_size|lru_width|_hidden$|layer_size|conv_dim|d_rel|embedding_dim|text_dim|attention_dim|"
    r"mamba_expand_dim|qk_nope|qk_rope|v_head|output_dim|hidden_act_dim|mlp_dim|bottleneck|num_channels_out|rotary_dim)"
)
_NOT_WIDTH = re.compile(
    r"(vocab|num_|^n_heads|max_|patch|image|window|kernel|ratio|multiplier|factor|state_size|groups)"
)
_LAYERS = re.compile(r"(^num_.*layers?$|^n_layers?$|hidden_layers$|^depth$|_layers$|^n_layer$|^layers$)")
_EXPERTS = re.compile(r"(num_.*experts$|n_routed_experts|moe_num_experts|num_local_experts|^num_experts$)")
_TOKENS = re.compile(r"(token_id|token_index|token_ids|_id|_token)$")
_SECTIONS = ("mrope_section",)
VOCABULARY = 320


def configs_of(config: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield a configuration and all configurations nested in it."""
    seen = seen if seen is not None else set()
    if id(config) in seen:
        return
    seen.add(id(config))
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from configs_of(value, seen)


def divisor(config: Any, least: int = 8) -> int:
    """Return the largest power of two that leaves every head at least ``least`` units wide."""
    widths = []
    for part in configs_of(config):
        heads = next(
            (
                getattr(part, n)
                for n in (
                    "num_attention_heads",
                    "num_heads",
                    "n_head",
                    "n_heads",
                    "encoder_attention_heads",
                    "decoder_attention_heads",
                    "attention_heads",
                )
                if isinstance(getattr(part, n, None), int)
            ),
            None,
        )
        size = next(
            (
                getattr(part, n)
                for n in ("hidden_size", "d_model", "n_embd", "embed_dim")
                if isinstance(getattr(part, n, None), int)
            ),
            None,
        )
        dim = getattr(part, "head_dim", None)
        rope = getattr(part, "qk_rope_head_dim", None)
        if isinstance(rope, int) and rope > 0:
            dim = min(rope, dim) if isinstance(dim, int) and dim else rope
        if not isinstance(dim, int) and heads and size:
            dim = size // heads
        if isinstance(dim, int) and dim:
            widths.append(dim)
    narrowest = min(widths, default=64)
    out = 1
    while narrowest // (2 * out) >= least and narrowest % (2 * out) == 0:
        out *= 2
    return out


def shrink(config: Any, by: int, *, images: bool = True, layers: int = 2) -> Any:
    """Shrink a configuration in place: smaller widths, at most four experts, a small vocabulary and small images.

    Args:
        config: the configuration, including those nested in it.
        by: divisor of all widths.
        images: whether to shrink images, too.
        layers: largest number of layers.

    Returns:
        ``config``.
    """
    for part in configs_of(config):
        for name, value in list(vars(part).items()):
            try:
                _shrink_one(part, name, value, by, images, layers)
            except Exception:
                continue
    return config


def _scales(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name)


def _shrink_one(part: Any, name: str, value: Any, by: int, images: bool, layers: int) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if _LAYERS.search(name) and value > layers:
            setattr(part, name, layers)
        elif name == "max_source_positions" and value > 32:
            setattr(part, name, 32)
        elif _EXPERTS.search(name) and value > 4:
            setattr(part, name, 4)
        elif name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k") and value > 2:
            setattr(part, name, 2)
        elif name == "vocab_size" and value > VOCABULARY:
            setattr(part, name, VOCABULARY)
        elif _TOKENS.search(name) and value >= VOCABULARY:
            setattr(part, name, VOCABULARY - 1 - len(name) % 40)
        elif images and name == "image_size" and isinstance(getattr(part, "patch_size", None), int):
            setattr(part, name, 4 * part.patch_size if part.patch_size >= 14 else min(value, 128))
        elif _scales(name) and value % by == 0 and value > by:
            setattr(part, name, value // by)
    elif isinstance(value, (list, tuple)) and value:
        if name in ("layer_types", "mlp_layer_types", "block_types", "layers_block_type"):
            setattr(part, name, list(dict.fromkeys(value))[:layers] + list(value)[: max(0, layers - len(set(value)))])
        elif _scales(name) and all(type(v) is int and v % by == 0 for v in value):
            setattr(part, name, type(value)(v // by for v in value))
    elif isinstance(value, dict):
        for key in _SECTIONS:
            if key in value:
                value[key] = [v // by for v in value[key]]
