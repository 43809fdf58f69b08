"""What the study trains and measures, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.models import GPTConfig, LlamaConfig, MLPConfig, ModelConfig

CHECKPOINTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets of the study.

    Attributes:
        steps: training steps of each subject.
        batch: sequences per step.
        seq_len: tokens per sequence.
        lr: peak learning rate, linear warm-up over 10 % and linear decay.
        hessian_batches: fixed batches over which the Hessian is the mean.
        gradient_batches: batches over which squared gradients are averaged.
        permutations: of the null of ``block_structure``.
        slq_steps: Lanczos steps.
        slq_probes: Lanczos start vectors.
        norm_probes: probes per block of the block-norm map.
        check_steps: steps of the training runs that check the rules.
        check_seeds: seeds of those.
        seed: of everything else.
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
        steps=40, batch=8, seq_len=8, hessian_batches=1, gradient_batches=8, permutations=20, slq_steps=10,
        slq_probes=3, norm_probes=2, check_steps=20, check_seeds=(0, 1),
    ),
}  # fmt: skip


def subjects(profile: str) -> dict[str, ModelConfig]:
    """The models of a profile: two Transformers that vote on the rules, and a classifier for contrast."""
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
