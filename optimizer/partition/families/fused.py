"""Attention with fused projections, declared per class, because one name is used for several layouts."""

from __future__ import annotations

from ..roles import Anatomy, Part, Role
from .makers import K, Q, V, heads, per_group, per_head, rows, segments, stacked, thirds_per_head, vector
from .table import Context, Family


def gpt2_c_attn(context: Context, why: str) -> Anatomy:
    """Describe GPT-2's c_attn: [Q|K|V] in self-attention, [K|V] in cross-attention."""
    return (stacked(K, V) if context.flag("is_cross_attention") else stacked(Q, K, V))(context, why)


def bigcode_c_attn(context: Context, why: str) -> Anatomy:
    """Describe GPTBigCode's c_attn.

    It is [K|V] in cross-attention, [Q|K|V] with one key head in multi-query attention, and (head, 3, head_dim)
    otherwise.
    """
    if context.flag("is_cross_attention"):
        return stacked(K, V)(context, f"{why}; [K|V] in cross-attention")
    if context.flag("multi_query"):
        return stacked(Q, K, V)(context, f"{why}; multi-query: [Q|K|V] with one key head")
    return thirds_per_head(Q, K, V)(context, f"{why}; (head, 3, head_dim)")


def falcon_query_key_value(context: Context, why: str) -> Anatomy:
    """Describe Falcon's query_key_value, which has one of three layouts, depending on flags of the module."""
    if context.flag("new_decoder_architecture"):
        return per_group(context, f"{why}; 40B: (kv group, queries + 2, head_dim)")
    if context.flag("multi_query"):
        head_dim = context.ask("head_dim")
        layout = segments((Q, "...", "head_dim"), (K, head_dim, head_dim), (V, head_dim, head_dim))
        return layout(context, f"{why}; 7B: [Q heads|one K|one V]")
    return thirds_per_head(Q, K, V)(context, f"{why}; RW: (head, 3, head_dim)")


def codegen_qkv(context: Context, why: str) -> Anatomy:
    """Describe CodeGen's qkv_proj: four chunks, each [Q|V|K]."""
    chunks = 4
    size, n_heads = context.outputs, context.ask("num_attention_heads", "n_head")
    if size % (3 * n_heads) or n_heads % chunks:
        raise ValueError(f"{n_heads} heads in {chunks} chunks do not divide {size} units")
    local, head_dim = size // (3 * chunks), size // (3 * n_heads)
    layout = per_head((Q, local), (V, local), (K, local))(context, why)
    parts = [Part(part.role, part.size, head_dim) for part in layout.parts]
    return context.anatomy(parts, why, repeat=chunks)


def levit_qkv(context: Context, why: str) -> Anatomy:
    """Describe LeViT's qkv: per head, a query and a key of key_dim units and a value of attention_ratio * key_dim."""
    dim = context.ask("key_dim")
    return per_head((Q, dim), (K, dim), (V, context.ask("attention_ratio") * dim))(context, why)


def levit_kv(context: Context, why: str) -> Anatomy:
    """Describe the kv projection of LeViT's subsampling attention: per head, a key and a value."""
    dim = context.ask("key_dim")
    return per_head((K, dim), (V, context.ask("attention_ratio") * dim))(context, why)


def channel_groups(context: Context, why: str) -> Anatomy:
    """Describe [Q|K|V] of channel attention, in which channels attend to the channels of their group."""
    size = context.outputs // 3
    width = size // context.ask("groups")
    return context.anatomy([Part(role, size, width) for role in (Q, K, V)], why)


def transformer_engine_qkv(context: Context, why: str) -> Anatomy:
    """Describe TransformerEngine's qkv: interleaved by group or [Q|K|V], depending on a flag of the module."""
    if context.flag("qkv_weight_interleaved"):
        return per_group(context, f"{why}; (kv group, queries + 2, head_dim)")
    return stacked(Q, K, V)(context, f"{why}; [Q|K|V]")


def qwen_qkvz(context: Context, why: str) -> Anatomy:
    """Describe Qwen3-Next's in_proj_qkvz: per key head, [q | k | v of its value heads | z of its value heads]."""
    k_dim, v_dim = context.ask("head_k_dim"), context.ask("head_v_dim")
    ratio = context.ask("num_v_heads") // context.ask("num_k_heads")
    parts = ((Q, k_dim), (K, k_dim), (V, ratio * v_dim), (Role.MLP_IN, ratio * v_dim))
    return per_head(*parts, heads=("num_k_heads",))(context, why)


# Unformatted, because one name per line would take forty lines.
# fmt: off
_VISION = (
    "BlipAttention", "Blip2Attention", "InstructBlipAttention", "InstructBlipVideoAttention",
    "CohereCompassVisionAttention", "DeepseekOcr2SamVisionAttention", "Dots3NoteVisionAttention",
    "Ernie4_5_VLMoeVisionAttention", "Exaone4_5_VisionAttention", "Florence2VisionWindowAttention",
    "Glm4vVisionAttention", "Glm4vMoeVisionAttention", "Glm5NextVisionAttention", "GlmImageVisionAttention",
    "GlmOcrVisionAttention", "GotOcr2VisionAttention", "HieraMaskUnitAttention", "MgpstrAttention",
    "PPFormulaNetVisionAttention", "PPOCRV5MobileRecAttention", "PPOCRV5ServerRecAttention",
    "PPOCRV6SmallRecAttention", "Qwen2_5_VLVisionAttention", "VisionAttention", "Qwen3_5VisionAttention",
    "Qwen3_5MoeVisionAttention", "Qwen3OmniMoeVisionAttention", "Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention",
    "Qwen4ExpVisionAttention", "SamVisionAttention", "SamVisionSdpaAttention", "Sam2MultiScaleAttention",
    "SamHQVisionAttention", "SegGptAttention", "SLANeXtVisionAttention", "TimesformerSelfAttention",
    "UnlimitedOcrSamVisionAttention", "UnlimitedOcrSamVisionSdpaAttention", "VitDetAttention",
)
# fmt: on
_OUTPUT = {name: rows(Role.ATTENTION_OUT) for name in ("proj", "projection", "dense", "o_proj", "out_proj", "Wo")}

_TRANSFORMER_ENGINE = {
    "layernorm_qkv": transformer_engine_qkv,
    "layernorm_qkv.query_weight": heads(Q, query=("layernorm_qkv.query_weight",)),
    "layernorm_qkv.key_weight": heads(K, query=("layernorm_qkv.query_weight",)),
    "layernorm_qkv.value_weight": heads(V, query=("layernorm_qkv.query_weight",), key=("layernorm_qkv.key_weight",)),
    "proj": rows(Role.ATTENTION_OUT),
}

FUSED: tuple[Family, ...] = (
    Family(
        classes=("MultiheadAttention",),
        library="torch",
        why="torch MultiheadAttention: in_proj is [Q|K|V] by rows; separate projections if kdim or vdim differ",
        params={
            "in_proj_weight": stacked(Q, K, V),
            "q_proj_weight": heads(Q, query=("q_proj_weight",)),
            "k_proj_weight": heads(K, query=("q_proj_weight",)),
            "v_proj_weight": heads(V, query=("q_proj_weight",)),
            "in_proj_bias": vector(Role.BIAS),
            "bias_k": vector(Role.BIAS),
            "bias_v": vector(Role.BIAS),
            "out_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention", "Attention"),
        children=("c_attn", "c_proj"),
        library="transformers",
        why="transformers GPT-2: Conv1D (in, out) with columns [Q|K|V], or [K|V] in cross-attention",
        params={
            "c_attn": gpt2_c_attn,
            "q_attn": heads(Q, query=("q_attn",)),
            "c_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("GPTBigCodeAttention",),
        library="transformers",
        why="GPTBigCode",
        params={
            "c_attn": bigcode_c_attn,
            "q_attn": heads(Q, query=("q_attn",)),
            "c_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("FalconAttention",),
        library="transformers",
        why="Falcon",
        params={"query_key_value": falcon_query_key_value, "dense": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=(
            "GPTNeoXAttention",
            "GPTNeoXJapaneseAttention",
            "BloomAttention",
            "PersimmonAttention",
            "MiniMaxLightningAttention",
        ),
        library="transformers",
        why="query, key and value of each head are adjacent: (head, 3, head_dim)",
        params={
            "query_key_value": thirds_per_head(Q, K, V),
            "qkv_proj": thirds_per_head(Q, K, V),
            "output_gate": rows(Role.MLP_IN),
        }
        | _OUTPUT,
    ),
    Family(
        classes=("DisentangledSelfAttention",),
        children=("in_proj",),
        library="transformers",
        why="DeBERTa v1: query, key and value of each head are adjacent: (head, 3, head_dim)",
        params={
            "in_proj": thirds_per_head(Q, K, V),
            "pos_proj": heads(K, query=("pos_proj",)),
            "pos_q_proj": heads(Q, query=("pos_q_proj",)),
        },
    ),
    Family(
        classes=("CodeGenAttention",),
        library="transformers",
        why="CodeGen: four chunks, each [Q|V|K]",
        params={"qkv_proj": codegen_qkv, "out_proj": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("Phi3Attention", "Phi4MultimodalAttention", "DbrxAttention", "MptAttention", "ModernBertAttention"),
        library="transformers",
        why="[Q|K|V] by rows; keys and values may have fewer heads than queries",
        params={"qkv_proj": stacked(Q, K, V), "Wqkv": stacked(Q, K, V)} | _OUTPUT,
    ),
    Family(
        classes=_VISION,
        library="transformers",
        why="vision attention: qkv is (3, head, head_dim) by rows",
        params={"qkv": stacked(Q, K, V)} | _OUTPUT,
    ),
    Family(
        classes=("Florence2VisionChannelAttention",),
        library="transformers",
        why="channel attention: qkv is (3, group, channels per group) by rows",
        params={"qkv": channel_groups} | _OUTPUT,
    ),
    Family(
        classes=("LevitAttention",),
        library="transformers",
        why="LeViT: per head, a query, a key and a wider value",
        params={"queries_keys_values.linear": levit_qkv, "projection.linear": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        classes=("LevitAttentionSubsample",),
        library="transformers",
        why="LeViT's subsampling attention: per head, a key and a wider value",
        params={
            "queries.linear": heads(Q, dim=("key_dim",)),
            "keys_values.linear": levit_kv,
            "projection.linear": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("MobileViTV2LinearSelfAttention",),
        library="transformers",
        why="separable attention: one score, then context and value channels, all independent units",
        params={
            "qkv_proj.convolution": rows(Role.MLP_IN),
            "out_proj.convolution": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("JetMoeAttention",),
        library="transformers",
        why="JetMoE: kv_proj is [K|V]; queries are projected by experts",
        params={
            "kv_proj": segments((K, "kv_projection_size", "head_dim"), (V, "kv_projection_size", "head_dim")),
            "experts.input_linear": heads(Q, dim=("head_dim", "kv_channels")),
            "experts.output_linear": rows(Role.ATTENTION_OUT),
            "experts.router.layer": rows(Role.MLP_IN),
        },
    ),
    Family(
        classes=("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"),
        library="transformers",
        why="gated attention: q_proj is (head, [query|gate])",
        params={
            "q_proj": per_head((Q, "head_dim"), (Role.MLP_IN, "head_dim")),
            "k_proj": heads(K, dim=("head_dim",)),
            "v_proj": heads(V, dim=("head_dim",)),
            "o_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("Qwen35Attention",),
        children=("wq", "wk", "wv", "wo"),
        why="torchtitan's Qwen3.5: wq is (head, [query|gate])",
        params={
            "wq": per_head((Q, "head_dim"), (Role.MLP_IN, "head_dim")),
            "wk": heads(K, dim=("head_dim",)),
            "wv": heads(V, dim=("head_dim",)),
            "wo": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("Qwen3NextGatedDeltaNet",),
        library="transformers",
        why="gated delta rule: per key head, [q|k|v|z]",
        params={
            "in_proj_qkvz": qwen_qkvz,
            "in_proj_ba": rows(Role.MLP_IN),
            "out_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        children=("in_proj_qkv", "in_proj_z", "out_proj"),
        library=None,
        why="gated delta rule: [q|k|v], with separate gates",
        params={
            "in_proj_qkv": segments(
                (Q, "key_dim", "head_k_dim"), (K, "key_dim", "head_k_dim"), (V, "...", "head_v_dim")
            ),
            "in_proj_z": rows(Role.MLP_IN),
            "in_proj_b": rows(Role.MLP_IN),
            "in_proj_a": rows(Role.MLP_IN),
            "out_proj": rows(Role.ATTENTION_OUT),
        },
    ),
    Family(
        classes=("BarkSelfAttention",),
        library="transformers",
        why="Bark: [Q|K|V] by rows",
        params={"att_proj": stacked(Q, K, V)} | _OUTPUT,
    ),
    Family(
        children=("c_attn", "c_proj"),
        fused=True,
        why="nanoGPT style: c_attn is [Q|K|V] by output units",
        params={"c_attn": stacked(Q, K, V), "c_proj": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("qkv", "proj"),
        fused=True,
        why="timm and litgpt: qkv is [Q|K|V] by rows",
        params={
            "qkv": stacked(Q, K, V),
            "proj": rows(Role.ATTENTION_OUT),
            "proj_l": rows(Role.MLP_IN),  # CaiT mixes heads before the softmax with proj_l, after it with proj_w
            "proj_w": rows(Role.MLP_IN),
        },
    ),
    Family(
        children=("q", "kv", "proj"),
        fused=True,
        why="timm: a query projection, and a fused key and value projection [K|V]",
        params={"q": heads(Q, query=("q",)), "kv": stacked(K, V), "proj": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("Wqkv",),
        fused=True,
        why="MosaicML and flash-attention style: Wqkv is [Q|K|V] by rows",
        params={"Wqkv": stacked(Q, K, V)} | _OUTPUT,
    ),
    Family(
        classes=("FusedQKVLinear", "InternLM2Attention", "InternLM2FlashAttention2"),
        children=("wqkv",),
        why="torchtitan and InternLM2 (from their source, not run): (kv group, queries + 2, head_dim)",
        params={"wqkv": per_group, "wo": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("wqkv", "wo"),
        fused=True,
        why="gpt-fast style: wqkv is [Q|K|V] by rows",
        params={"wqkv": stacked(Q, K, V), "wo": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("to_qkv",),
        fused=True,
        why="diffusers and lucidrains style: to_qkv is [Q|K|V] by rows",
        params={"to_qkv": stacked(Q, K, V)}
        | {name: rows(Role.ATTENTION_OUT) for name in ("to_out", "to_out.0", "out_proj")},
    ),
    Family(
        children=("linear_qkv", "linear_proj"),
        why="Megatron core (from its documentation): (kv group, queries + 2, head_dim)",
        params={"linear_qkv": per_group, "linear_proj": rows(Role.ATTENTION_OUT)},
    ),
    Family(
        children=("layernorm_qkv", "proj"),
        why="TransformerEngine (from its documentation)",
        params=_TRANSFORMER_ENGINE,
    ),
)
