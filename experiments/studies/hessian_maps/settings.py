"""The models and settings of the study."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.models import GPTConfig, LlamaConfig, MLPConfig, ModelConfig

CHECKPOINTS = (0.0, 0.5, 1.0)
"""Fractions of the training after which the models are measured."""


@dataclass(frozen=True)
class Settings:
    """Sizes and numbers of samples of the study.

    Attributes:
        steps: number of training steps of each subject.
        batch: number of sequences per step.
        seq_len: number of tokens per sequence.
        lr: peak learning rate, after a linear warm-up over 10 % of the steps and before a linear decay.
        hessian_batches: number of fixed batches over which the loss of the Hessian is averaged.
        gradient_batches: number of batches over which squared gradients are averaged.
        permutations: number of random partitions that ``block_structure`` compares with.
        slq_steps: number of Lanczos steps.
        slq_probes: number of Lanczos start vectors.
        norm_probes: number of probes per block of the block-norm map.
        check_steps: number of steps of the training runs that check the rules.
        check_seeds: seeds of the training runs that check the rules.
        seed: seed of everything else.
    """

    steps: int = 2000
    batch: int = 32
    seq_len: int = 16
    lr: float = 1e-2
    hessian_batches: int = 1
    gradient_batches: int = 64
    permutations: int = 200
    slq_steps: int = 80
    slq_probes: int = 10
    norm_probes: int = 8
    check_steps: int = 600
    check_seeds: tuple[int, ...] = (0, 1, 2)
    seed: int = 0


PROFILES = {
    "full": Settings(),
    "smoke": Settings(
        steps=40,
        batch=8,
        seq_len=8,
        hessian_batches=1,
        gradient_batches=8,
        permutations=20,
        slq_steps=10,
        slq_probes=3,
        norm_probes=2,
        check_steps=20,
        check_seeds=(0, 1),
    ),
}


def subjects(profile: str) -> dict[str, ModelConfig]:
    """Return the models of a profile: two Transformers, from which rules are derived, and an MLP for comparison."""
    if profile == "smoke":
        return {
            "gpt": GPTConfig(vocab=8, block_size=8, n_embd=8, n_layer=1, n_head=2),
            "llama": LlamaConfig(vocab=8, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden=8),
            "mlp": MLPConfig(context=4, hidden=4),
        }
    return {
        "gpt": GPTConfig(vocab=8, block_size=16, n_embd=16, n_layer=1, n_head=4),
        "llama": LlamaConfig(vocab=8, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=32),
        "mlp": MLPConfig(vocab=8, context=8, hidden=8),
    }
