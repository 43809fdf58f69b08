"""Small instances of many architectures, in sizes that give wrong guesses away.

Heads x head_dim is not the hidden size where the architecture allows it, head counts are odd, key-value heads few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

LLAMA = {
    "vocab_size": 80,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EVEN = {**LLAMA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
PLAIN = {**{k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}}
BERT = {**PLAIN, "hidden_size": 30, "num_attention_heads": 5, "max_position_embeddings": 40}
MOE = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
MLA = {
    **{k: v for k, v in LLAMA.items() if k != "head_dim"},
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 10,
    "n_shared_experts": 1,
}
VISION = {
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}


def _of(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        made = getattr(transformers, config)(**settings)
        made._attn_implementation = "eager"
        return getattr(transformers, name)(made)

    return make


def _causal(family: str, **settings: Any) -> Callable[[], nn.Module]:
    return _of(f"{family}ForCausalLM", f"{family}Config", **settings)


TEXT: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=80, n_embd=30, n_layer=2, n_head=5, n_positions=16),
    "gpt2 cross": _of(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=80,
        n_embd=30,
        n_layer=1,
        n_head=3,
        n_positions=16,
        add_cross_attention=True,
    ),
    "gpt_neo": _causal(
        "GPTNeo",
        vocab_size=80,
        hidden_size=30,
        num_layers=2,
        num_heads=5,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=8,
    ),
    "gpt_neox": _causal("GPTNeoX", **{**PLAIN, "hidden_size": 40, "num_attention_heads": 5}),
    "gptj": _causal("GPTJ", vocab_size=80, n_embd=40, n_layer=2, n_head=5, n_positions=32, rotary_dim=4),
    "codegen": _causal(
        "CodeGen", vocab_size=80, n_embd=64, n_layer=2, n_head=8, n_positions=32, n_ctx=32, rotary_dim=4
    ),
    "gpt_bigcode mqa": _causal(
        "GPTBigCode", vocab_size=80, n_embd=30, n_layer=2, n_head=5, n_positions=32, multi_query=True
    ),
    "gpt_bigcode mha": _causal(
        "GPTBigCode", vocab_size=80, n_embd=30, n_layer=2, n_head=5, n_positions=32, multi_query=False
    ),
    "bloom": _causal("Bloom", vocab_size=80, hidden_size=30, n_layer=2, n_head=5),
    "falcon 7b": _causal(
        "Falcon", vocab_size=80, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, multi_query=True
    ),
    "falcon 40b": _causal(
        "Falcon",
        vocab_size=80,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon rw": _causal(
        "Falcon",
        vocab_size=80,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        multi_query=False,
        alibi=True,
    ),
    "opt": _causal(
        "OPT",
        vocab_size=80,
        hidden_size=30,
        ffn_dim=44,
        num_hidden_layers=2,
        num_attention_heads=5,
        word_embed_proj_dim=20,
        max_position_embeddings=32,
    ),
    "mpt": _causal("Mpt", vocab_size=80, d_model=30, n_layers=2, n_heads=5, max_seq_len=32),
    "llama": _causal("Llama", **LLAMA),
    "llama grouped": _causal("Llama", **EVEN, tie_word_embeddings=True),
    "mistral": _causal("Mistral", **LLAMA),
    "mixtral": _causal("Mixtral", **LLAMA, **MOE),
    "qwen2": _causal("Qwen2", **{**EVEN, "hidden_size": 36}),
    "qwen2_moe": _causal("Qwen2Moe", **EVEN, **MOE, shared_expert_intermediate_size=14),
    "qwen3": _causal("Qwen3", **LLAMA),
    "qwen3_moe": _causal("Qwen3Moe", **LLAMA, **MOE),
    "qwen3_next": _causal(
        "Qwen3Next",
        **{**EVEN, "head_dim": 8},
        **{**MOE, "moe_intermediate_size": 16},
        shared_expert_intermediate_size=14,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
    ),
    "gemma": _causal("Gemma", **LLAMA),
    "gemma2": _causal("Gemma2", **EVEN),
    "gemma3": _of("Gemma3ForCausalLM", "Gemma3TextConfig", **EVEN),
    "phi": _causal("Phi", **{**PLAIN, "hidden_size": 40, "num_attention_heads": 5}),
    "phi3": _causal("Phi3", **{**EVEN, "hidden_size": 48, "head_dim": 8}),
    "stablelm": _causal("StableLm", **{**EVEN, "head_dim": 8}),
    "olmo2": _causal("Olmo2", **{**EVEN, "head_dim": 8}),
    "cohere": _causal("Cohere", **EVEN, use_qk_norm=True),
    "starcoder2": _causal("Starcoder2", **{**EVEN, "head_dim": 8}),
    "granite": _causal("Granite", **{**EVEN, "head_dim": 8}),
    "gpt_oss": _causal("GptOss", **LLAMA, **MOE),
    "llama4": _of(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **{**LLAMA, "num_experts_per_tok": 1},
        num_local_experts=3,
        intermediate_size_mlp=20,
        moe_layers=[1],
        attn_temperature_tuning=False,
    ),
    "deepseek_v2": _causal("DeepseekV2", **MLA),
    "deepseek_v2 lite": _causal("DeepseekV2", **{**MLA, "q_lora_rank": None}),
    "deepseek_v3": _causal("DeepseekV3", **MLA),
    "dbrx": _causal(
        "Dbrx",
        vocab_size=80,
        d_model=48,
        n_heads=6,
        n_layers=2,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={
            "ffn_hidden_size": 20,
            "moe_num_experts": 3,
            "moe_top_k": 2,
            "hidden_size": 48,
            "ffn_act_fn": {"name": "silu"},
        },
    ),
    "jetmoe": _causal(
        "JetMoe",
        vocab_size=80,
        hidden_size=40,
        num_hidden_layers=2,
        num_key_value_heads=3,
        kv_channels=6,
        intermediate_size=20,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    "nemotron": _causal("Nemotron", **EVEN),
    "hunyuan": _causal("HunYuanDenseV1", **EVEN),
    "hunyuan_moe": _causal("HunYuanMoEV1", **EVEN, **MOE, moe_topk=[2, 2]),
    "ministral": _causal("Ministral", **EVEN, layer_types=["sliding_attention", "full_attention"]),
    "dots1": _causal(
        "Dots1", **EVEN, **{**MOE, "n_routed_experts": 3, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    ),
    "lfm2_moe": _causal("Lfm2Moe", **{**EVEN, "head_dim": 8}, **MOE, layer_types=["conv", "full_attention"]),
    "esm": _of("EsmForMaskedLM", "EsmConfig", **BERT, mask_token_id=3),
    "modernbert": _of("ModernBertForMaskedLM", "ModernBertConfig", **{**BERT, "cls_token_id": 1, "sep_token_id": 2}),
    "bert": _of("BertForMaskedLM", "BertConfig", **BERT),
    "roberta": _of("RobertaForMaskedLM", "RobertaConfig", **BERT),
    "deberta": _of(
        "DebertaForMaskedLM",
        "DebertaConfig",
        **BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=16,
    ),
    "deberta_v2": _of("DebertaV2ForMaskedLM", "DebertaV2Config", **BERT),
    "t5": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=80,
        d_model=30,
        d_kv=6,
        d_ff=44,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
    ),
    "t5 gated": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=80,
        d_model=30,
        d_kv=4,
        d_ff=44,
        num_layers=1,
        num_heads=7,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "bart": _of(
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=80,
        d_model=30,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=5,
        encoder_ffn_dim=44,
        decoder_ffn_dim=36,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=80,
        num_mel_bins=8,
        d_model=30,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=5,
        encoder_ffn_dim=44,
        decoder_ffn_dim=36,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "mamba2": _causal(
        "Mamba2",
        vocab_size=80,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=2,
        chunk_size=4,
    ),
}

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "vit": _of("ViTForImageClassification", "ViTConfig", **VISION),
    "clip": _of(
        "CLIPModel",
        "CLIPConfig",
        text_config={**BERT, "intermediate_size": 44, "projection_dim": 20},
        vision_config=VISION,
        projection_dim=20,
    ),
    "siglip": _of("SiglipModel", "SiglipConfig", text_config=BERT, vision_config=VISION),
    "gemma3 multimodal": _of(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config=EVEN,
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
    ),
    "qwen2_5_vl": _of(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config={
            **EVEN,
            "hidden_size": 48,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    ),
}


def cross_attention_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a decoder with cross attention is called with."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    return {
        "input_ids": torch.tensor([[3, 4, 5, 6]]),
        "encoder_hidden_states": torch.randn(1, 4, width, generator=generator),
    }
