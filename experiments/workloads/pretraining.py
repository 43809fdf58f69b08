"""Pre-training with vocabularies of real models: this project's GPT-2 on GPT-2's tokens, its Llama on Mistral's.

At sizes that two cores train, most of the parameters are the embeddings and the output. ``experiments.recipes`` has the
paper's full sizes, from GPT-2 125M and Llama 39M on, which the same command trains.
"""

from __future__ import annotations

from typing import Any

from experiments.models import GPTConfig, LlamaConfig

from .workload import Workload

_RUN: dict[str, Any] = {
    "batch": 4,
    "seq_len": 128,
    "steps": 400,
    "eval_every": 100,
    "eval_batches": 16,
    "warmup": 0.1,
}
_SMOKE: dict[str, Any] = {
    "batch": 2, "seq_len": 32, "steps": 4, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2,
}  # fmt: skip
_RATES = (1e-3, 3e-3, 1e-2)

# As nanoGPT and the paper train GPT-2 (experiments.recipes): tied embeddings, padded vocabulary, no biases, its initial
# weights, cosine decay to a twentieth, which is 6e-4 to 3e-5.
GPT2 = Workload(
    {
        **_RUN,
        "model": GPTConfig(50_304, 128, 64, 4, 4, tied=True, bias=False, init="gpt2"),
        "data": "enwik8-gpt2-3m",
        "decay": "cosine",
        "lr_end": 0.05,
    },
    {**_SMOKE, "model": GPTConfig(50_304, 32, 16, 1, 2, tied=True, bias=False, init="gpt2")},
    _RATES,
)
LLAMA = Workload(
    {
        **_RUN,
        "model": LlamaConfig(32_000, 64, 4, 4, 2, 192, init="gpt2"),
        "data": "enwik8-mistral-v1-3m",
    },
    {**_SMOKE, "model": LlamaConfig(32_000, 16, 1, 2, 1, 48, init="gpt2")},
    _RATES,
)
