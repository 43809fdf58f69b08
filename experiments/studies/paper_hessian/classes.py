"""Part ``classes``: how strongly a classifier's Hessian is concentrated in blocks, against its number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.studies.paper_hessian.store import Cell, Part, settings_of
from hessian import HessianOperator, dense

Batch = tuple[Tensor, Tensor]
LOSSES = ("mse", "cross-entropy")


@dataclass(frozen=True)
class Settings:
    """Sizes of the part.

    Attributes:
        classes: numbers of classes C.
        whole: largest C for which the whole Hessian is computed.
        inputs: width of the inputs.
        hidden: number of hidden units.
        examples: number of examples.
        sampled: number of classes whose blocks of the output layer are computed, chosen at random, if C is larger.
        seeds: seeds of weights, inputs and labels.
    """

    classes: tuple[int, ...] = (10, 30, 100, 300, 1000)
    whole: int = 100
    inputs: int = 16
    hidden: int = 8
    examples: int = 250
    sampled: int = 24
    seeds: int = 6


PROFILES = {
    "full": Settings(),
    "smoke": Settings(classes=(4, 8, 16), whole=8, inputs=6, hidden=4, examples=64, sampled=8, seeds=2),
}


def part(profile: str) -> Part:
    """Return the part of a profile."""
    s = PROFILES[profile]
    cells = [
        Cell(f"{loss}, C {c}, seed {k}", 0.3 + c / 100, lambda loss=loss, c=c, k=k: measure(s, loss, c, k))
        for k in range(s.seeds)
        for loss in LOSSES
        for c in s.classes
    ]
    return Part("classes", settings_of(s), cells)


class Classifier(nn.Module):
    """One hidden ReLU layer without biases. The output layer is in two pieces, so that the Hessian of one is at hand.

    Args:
        inputs: width of the inputs.
        hidden: number of hidden units.
        classes: number of classes.
        sampled: number of classes in the first piece.
        seed: seed of the weights, which are drawn as torch draws those of ``nn.Linear``.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, sampled: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int) -> nn.Parameter:
            uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter((2 * uniform - 1) * columns**-0.5)

        self.first = draw(hidden, inputs)
        output = draw(classes, hidden)
        self.some, self.others = nn.Parameter(output[:sampled].detach()), nn.Parameter(output[sampled:].detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [N, inputs] to outputs [N, classes]."""
        return F.relu(x @ self.first.T) @ torch.cat([self.some, self.others]).T


def loss_of(name: str) -> Any:
    """Return ``loss(model, batch)``: cross-entropy, or half the squared distance to the one-hot label."""

    def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def mse(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch[0])
        one_hot = F.one_hot(batch[1], outputs.shape[1]).to(outputs.dtype)
        return 0.5 * (outputs - one_hot).square().sum(1).mean()

    return mse if name == "mse" else cross_entropy


def measure(settings: Settings, loss: str, classes: int, seed: int) -> dict[str, Any]:
    """Measure the blocks of one random classifier on standard normal inputs with random labels.

    Returns:
        ``hidden`` (the hidden layer by hidden unit), ``output`` (the output layer by class, of the sampled classes)
        and, up to ``whole`` classes, ``whole`` (all parameters, by hidden unit and by class), each as ``ratios``.
    """
    sampled = min(classes, settings.sampled)
    model = Classifier(settings.inputs, settings.hidden, classes, sampled, 1000 * classes + seed)
    generator = torch.Generator().manual_seed(5_000_000 + 1000 * classes + seed)
    x = torch.randn(settings.examples, settings.inputs, generator=generator, dtype=torch.float64)
    batch = (x, torch.randint(classes, (settings.examples,), generator=generator))
    named = dict(model.named_parameters())

    def hessian_of(names: tuple[str, ...]) -> Tensor:
        chosen = {name: named[name] for name in names}
        return dense(HessianOperator(model, loss_of(loss), chosen, [batch]))

    out = {
        "hidden": ratios(hessian_of(("first",)), settings.hidden),
        "output": ratios(hessian_of(("some",)), sampled),
    }
    if classes <= settings.whole:
        names = ("first", "some", "others") if sampled < classes else ("first", "some")
        widths = [settings.inputs] * settings.hidden + [settings.hidden] * classes
        out["whole"] = of_blocks(hessian_of(names), widths)
    return out


def ratios(matrix: Tensor, blocks: int) -> dict[str, float]:
    """Return the ratios of a Hessian whose parameters fall into equal consecutive blocks."""
    return of_blocks(matrix, [len(matrix) // blocks] * blocks)


def of_blocks(matrix: Tensor, widths: list[int]) -> dict[str, float]:
    """Return means per pair of blocks: squared Frobenius norms and mean absolute entries, in and off the diagonal.

    Args:
        matrix: [n, n].
        widths: sizes of the consecutive blocks.

    Returns:
        ``off_diagonal_square`` (mean squared Frobenius norm of the blocks off the diagonal, divided by that of the
        diagonal blocks), ``diagonal_off_absolute`` (mean absolute entry of the diagonal blocks, divided by that of all
        other entries; infinite if those are zero).
    """
    ids = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    indicator = F.one_hot(ids).to(matrix.dtype)
    squares, absolute = (indicator.T @ m @ indicator for m in (matrix.square(), matrix.abs()))
    count = len(widths)
    inside = torch.eye(count, dtype=torch.bool)
    areas = torch.outer(indicator.sum(0), indicator.sum(0))
    off_square = float(squares[~inside].mean() / squares[inside].mean())
    off_absolute = float(absolute[~inside].sum() / areas[~inside].sum())
    return {
        "off_diagonal_square": off_square,
        "diagonal_off_absolute": float(absolute[inside].sum() / areas[inside].sum()) / off_absolute
        if off_absolute
        else float("inf"),
    }
