"""Models of the benchmark: Llama, GPT-2 and Mixtral of transformers, in small sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# One row per size reads better than one line per number.
LLAMA = {
    "1M": (128, 344, 3, 1600), "10M": (384, 1024, 4, 4096), "45M": (512, 1376, 9, 16000),
    "100M": (768, 2048, 11, 16000), "300M": (1024, 2816, 18, 32000),
}  # fmt: skip
"""Hidden size, intermediate size, number of layers and vocabulary; heads are 64 wide."""
MODELS = {
    **{f"llama-{size}": ("llama", size) for size in LLAMA},
    "gpt2-124M": ("gpt2", "124M"),
    "mixtral-60M": ("mixtral", "60M"),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Build a model of ``MODELS`` with small parameters and gradients, which are the same at every call."""
    family, size = MODELS[name]
    with torch.device("meta"):
        model = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral}[family](size)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator)
    for parameter in model.parameters():
        values = noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()].view(parameter.shape)
        with torch.no_grad():
            parameter.copy_(0.02 * values)
        parameter.grad = (1e-3 * values).to(dtype)
    return model


def trainable(name: str) -> nn.Module:
    """Build a model of ``MODELS`` in fp32 with transformers' own random weights, the same at every call.

    The models of ``build`` are for steps only: they have no values in their buffers, such as rotary frequencies.
    """
    family, size = MODELS[name]
    make = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral}[family]
    with torch.device("meta"):
        make(size)  # The imports of the first model may draw random numbers.
    torch.manual_seed(0)
    return make(size).float()


def heads(name: str) -> dict[str, int]:
    """Return the model's sizes that the published package needs as arguments."""
    family, size = MODELS[name]
    dim = LLAMA[size][0] if family == "llama" else {"gpt2": 768, "mixtral": 512}[family]
    count = dim // 64
    return {"dim": dim, "n_heads": count, "n_kv_heads": 2 if family == "mixtral" else count}


def _llama(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden, layers, vocab = LLAMA[size]
    return LlamaForCausalLM(
        _config(
            LlamaConfig,
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=dim // 64,
            num_key_value_heads=dim // 64,
        )
    )


def _gpt2(_: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _mixtral(_: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        _config(
            MixtralConfig,
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_local_experts=8,
        )
    )


def _config(kind: Any, **options: Any) -> Any:
    return kind(tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, **options)


def deep_llama(layers: int, dim: int, hidden: int, vocab: int) -> nn.ModuleDict:
    """Build the parameters of a Llama with Meta's names, without a forward pass and without transformers."""

    def block() -> nn.ModuleDict:
        attention = nn.ModuleDict({k: nn.Linear(dim, dim, bias=False) for k in ("wq", "wk", "wv", "wo")})
        attention.n_heads = dim // 64
        forward = nn.ModuleDict(
            {
                "w1": nn.Linear(dim, hidden, bias=False),
                "w3": nn.Linear(dim, hidden, bias=False),
                "w2": nn.Linear(hidden, dim, bias=False),
            }
        )
        return nn.ModuleDict({"attention": attention, "feed_forward": forward, "norm": nn.RMSNorm(dim)})

    return nn.ModuleDict(
        {
            "tok_embeddings": nn.Embedding(vocab, dim),
            "layers": nn.ModuleList(block() for _ in range(layers)),
            "norm": nn.RMSNorm(dim),
            "output": nn.Linear(dim, vocab, bias=False),
        }
    )
