"""Tiny float64 models with their losses and batches, and an independent Hessian to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.models import GPTConfig, LlamaConfig, MLPConfig, build, lm_loss

Loss = Callable[[nn.Module, Any], Tensor]


def tokens(rows: int, length: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    return windows[:, :-1], windows[:, 1:]


def gpt(tied: bool = False) -> nn.Module:
    return build(GPTConfig(vocab=5, block_size=4, n_embd=4, n_layer=1, n_head=2, tied=tied), 0).double()


def llama() -> nn.Module:
    return build(LlamaConfig(vocab=5, dim=4, n_layers=1, n_heads=2, n_kv_heads=1, hidden=6), 0).double()


def mlp() -> nn.Module:
    return build(MLPConfig(vocab=3, context=2, hidden=4), 0).double()


def batches_for(model: nn.Module, sizes: tuple[int, ...] = (7, 3)) -> list[tuple[Tensor, Tensor]]:
    out = []
    for i, rows in enumerate(sizes):
        x, y = tokens(rows, 2 if "fc1.weight" in dict(model.named_parameters()) else 4, 3, i)
        out.append((x, y[:, -1]) if "fc1.weight" in dict(model.named_parameters()) else (x, y))
    return out


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def double_backward(model: nn.Module, batch: Any, params: dict[str, Tensor], loss: Loss = lm_loss) -> Tensor:
    """The Hessian by the oldest way there is: one backward pass through the gradient's graph per row."""
    tensors = list(params.values())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(model, batch), tensors, create_graph=True)
        flat = torch.cat([g.flatten() for g in gradient])
        rows = [
            torch.cat([
                p.flatten() for p in torch.autograd.grad(entry, tensors, retain_graph=True, materialize_grads=True)
            ]) for entry in flat
        ]  # fmt: skip
    return torch.stack(rows)


def functional_hessian(model: nn.Module, batch: Any, params: dict[str, Tensor], loss: Loss = lm_loss) -> Tensor:
    """``torch.func.hessian``, assembled in the same order."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return loss(self.inner, batch)

    theta = {f"inner.{name}": tensor.detach() for name, tensor in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        nested = torch.func.hessian(lambda t: torch.func.functional_call(Wrapped(), t, ()))(theta)
    sizes = {name: tensor.numel() for name, tensor in theta.items()}
    return torch.cat(
        [torch.cat([nested[a][b].reshape(sizes[a], sizes[b]) for b in theta], dim=1) for a in theta], dim=0
    )
