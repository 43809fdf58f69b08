"""Small models with every way of cutting blocks that matters: grouped heads, Conv1D columns, experts in three axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.optimizer.models import Llama


def llama(**changes: int) -> nn.Module:
    """Grouped heads of odd size, an uneven vocabulary."""
    options = {"vocab": 37, "dim": 24, "layers": 2, "n_heads": 6, "n_kv_heads": 3, "head_dim": 6, "hidden": 30}
    return Llama(**options | changes)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=16, n_embd=20, n_layer=2, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=18, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip
    config._experts_implementation = "eager"  # grouped kernels take no float64
    return MixtralForCausalLM(config)


def llama_parallel() -> nn.Module:
    """Heads that 2 and 3 ranks of tensor parallelism can share; a vocabulary that they cannot."""
    return llama(n_heads=6, n_kv_heads=6, hidden=36)


def wide() -> nn.Module:
    """Matrices that are large enough to be quantised, with rows of more than one block; nothing divides evenly."""
    return llama(dim=144, n_heads=6, n_kv_heads=3, head_dim=22, hidden=166)


def wide_parallel() -> nn.Module:
    """The same for tensor parallelism, which shares heads and hidden units evenly."""
    return llama(dim=144, n_heads=6, n_kv_heads=6, head_dim=22, hidden=168)


MODELS = {
    "wide": wide,
    "wide-parallel": wide_parallel,
    "llama": llama,
    "llama-parallel": llama_parallel,
    "gpt2": gpt2,
    "mixtral": mixtral,
}


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss."""
    out = model(tokens[:, :-1])
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(step: int, world: int, vocab: int = 37) -> list[Tensor]:
    """Every data-parallel rank's batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, vocab, (2, 9), generator=generator) for _ in range(world)]
