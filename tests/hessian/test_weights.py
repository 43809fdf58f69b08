"""The Hessian over several batches is that of the batches put together, whatever the loss is a mean over."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian import HessianOperator
from hessian.adapters.pyhessian import pyhessian_answer

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Scorer(nn.Module):
    """Tokens to logits, one position at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


def scorer() -> nn.Module:
    torch.manual_seed(0)
    return Scorer().double()


def example(rows: int, length: int, keep: int, seed: int, hole: int = -100) -> tuple[Tensor, Tensor]:
    """Tokens and labels; all but about ``keep`` of a row's labels are masked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 5, (rows, length), generator=generator)
    y = torch.randint(1, 5, (rows, length), generator=generator)
    for row in range(rows):
        y[row, keep + row % 2 :] = hole
    return x, y


def entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, 5), labels.reshape(-1), **options)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return entropy(logits[:, :-1], labels[:, 1:])


A, B, C = example(3, 6, 5, 0), example(3, 6, 1, 1), example(2, 6, 3, 2)
JOINED = (torch.cat([A[0], B[0], C[0]]), torch.cat([A[1], B[1], C[1]]))
CASES = {
    "labels in a tuple": (lambda b: b, lambda m, b: entropy(m(b[0]), b[1])),
    "shifted labels in a tuple": (lambda b: b, lambda m, b: shifted(m(b[0]), b[1])),
    "labels first": (lambda b: (b[1], b[0]), lambda m, b: entropy(m(b[1]), b[0])),
    "labels in nested lists": (lambda b: [[b[0]], {"y": b[1]}], lambda m, b: entropy(m(b[0][0]), b[1]["y"])),
    "a dict with an attention mask": (
        lambda b: {"input_ids": b[0], "attention_mask": (b[0] > 2).long(), "labels": b[1]},
        lambda m, b: shifted(m(b["input_ids"]), b["labels"]),
    ),
    "label smoothing": (lambda b: b, lambda m, b: entropy(m(b[0]), b[1], label_smoothing=0.2)),
    "a mean over the mask": (
        lambda b: (b[0], b[1] != -100),
        lambda m, b: (m(b[0]).square().sum(-1) * b[1]).sum() / b[1].sum(),
    ),
    "a mean over rows": (
        lambda b: b,
        lambda m, b: torch.stack([entropy(m(x), y) for x, y in zip(*b, strict=True)]).mean(),
    ),
    "a scalar first": (
        lambda b: (torch.tensor(0.5).double(), b[0]),
        lambda m, b: (m(b[1]) * b[0]).square().mean(),
    ),
    "a constant first": (
        lambda b: (torch.ones(6, 6).tril(), b[0]),
        lambda m, b: (b[0].double() @ m(b[1])).square().mean(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_weigh_what_their_loss_is_a_mean_over(case: str) -> None:
    shape, loss = CASES[case]
    model = scorer()
    whole = HessianOperator(model, loss, None, [shape(JOINED)])
    parts = HessianOperator(model, loss, None, [shape(A), shape(B), shape(C)])
    v = torch.randn(whole.shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(parts @ v, whole @ v, **EXACT)
    torch.testing.assert_close(parts.gradient(), whole.gradient(), **EXACT)


CLASS_WEIGHTS = torch.tensor([1.0, 5, 1, 0.1, 1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (lambda m, b: entropy(m(b[0]), b[1].clamp_min(0), ignore_index=0), lambda b: (b[1] > 0).sum()),
        (
            lambda m, b: entropy(m(b[0]), b[1].clamp_min(0), weight=CLASS_WEIGHTS),
            lambda b: CLASS_WEIGHTS[b[1].clamp_min(0)].sum(),
        ),
    ],
    ids=["another ignore_index", "class weights"],
)
def test_what_no_candidate_explains_is_refused_until_it_is_counted(loss, count) -> None:
    model = scorer()
    batches = [(x, y.clamp_min(0)) for x, y in (A, B, C)]
    with pytest.raises(ValueError, match=r"off by .*ignore_index, class weights.*count=.*mean_check=False"):
        HessianOperator(model, loss, None, batches)
    parts = HessianOperator(model, loss, None, batches, count=count)
    whole = HessianOperator(model, loss, None, [JOINED])
    v = torch.ones(parts.shape[0], dtype=torch.float64)
    torch.testing.assert_close(parts @ v, whole @ v, **EXACT)


def packed_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over sequences of the mean over each."""
    bounds, tokens = batch
    return torch.stack(
        [model(tokens[a:b]).square().mean() for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    ).mean()


@pytest.mark.parametrize(
    ("loss", "batches", "count"),
    [
        (lambda m, b: entropy(m(b[0]), b[1]), [example(2, 6, 9, 0), example(2, 3, 9, 1)], lambda b: b[1].numel()),
        (
            packed_loss,
            [(torch.tensor([0, 2, 6]), A[0].flatten()[:6]), (torch.tensor([0, 1, 3, 4]), B[0].flatten()[:4])],
            lambda b: len(b[0]) - 1,
        ),
    ],
    ids=["other lengths", "bounds of sequences first"],
)
def test_counts_that_cannot_be_told_equal_are_refused(loss, batches, count) -> None:
    model = scorer()
    with pytest.raises(ValueError, match=r"cannot be told.*rows of batch\[0\].*count="):
        HessianOperator(model, loss, None, batches)
    for each in batches:
        HessianOperator(model, loss, None, [each])  # one batch needs no weight
    parts = HessianOperator(model, loss, None, batches, count=count)
    v = torch.ones(parts.shape[0], dtype=torch.float64)
    counts = [count(batch) for batch in batches]
    alone = [HessianOperator(model, loss, None, [batch]) @ v for batch in batches]
    expected = sum(c * h for c, h in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(parts @ v, expected, **EXACT)


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (lambda b: 0, ValueError, r"count\(batches\[0\]\) gave 0"),
        (lambda b: float("nan"), ValueError, "gave nan"),
        (lambda b: "3", TypeError, "gave a str"),
        (lambda b: None, TypeError, "gave a NoneType"),
    ],
)
def test_counts_that_are_no_counts_are_refused(count, error, words: str) -> None:
    with pytest.raises(error, match=words):
        HessianOperator(scorer(), lambda m, b: entropy(m(b[0]), b[1]), None, [A, B], count=count)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    ).double()


def hugging_face(rows: int, length: int, keep: int, seed: int) -> dict[str, Tensor]:
    x, y = example(rows, length, keep, seed)
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}


@pytest.mark.parametrize(
    "batches",
    [
        [hugging_face(3, 6, 5, 0), hugging_face(3, 6, 1, 1)],
        [hugging_face(3, 6, 5, 0), hugging_face(3, 4, 1, 1)],
        [hugging_face(2, 6, 9, 0), hugging_face(3, 4, 9, 1)],
        [hugging_face(1, 6, 9, 0), hugging_face(1, 4, 9, 1)],
    ],
    ids=["one length", "two lengths", "nothing masked", "single rows"],
)
def test_hugging_face_counts_predicted_tokens(batches: list[dict[str, Tensor]]) -> None:
    model = llama()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    operator = HessianOperator(model, loss, None, batches)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    alone = [HessianOperator(model, loss, None, [batch]) @ v for batch in batches]
    expected = sum(c * h for c, h in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(operator @ v, expected, rtol=1e-7, atol=1e-9)


def test_hugging_face_s_fixed_divisor_is_refused() -> None:
    batch = {**hugging_face(3, 6, 5, 0), "num_items_in_batch": torch.tensor(7)}
    with pytest.raises(ValueError, match=r"not a mean.*num_items_in_batch"):
        HessianOperator(llama(), lambda m, b: m(**b).loss, None, [batch])


def contrastive(model: nn.Module, batch: Tensor) -> Tensor:
    """Each row against all rows of its batch."""
    z = F.normalize(model(batch).flatten(1), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def test_losses_that_compare_examples_have_an_opt_out() -> None:
    model, batches = scorer(), [A[0], B[0]]
    with pytest.raises(ValueError, match=r"not a mean.*mean_check=False"):
        HessianOperator(model, contrastive, None, batches)
    operator = HessianOperator(model, contrastive, None, batches, mean_check=False)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    alone = [HessianOperator(model, contrastive, None, [b], mean_check=False) @ v for b in batches]
    torch.testing.assert_close(operator @ v, (alone[0] + alone[1]) / 2, **EXACT)


def picky(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Takes three rows and no other number; a sum, which it does not let anybody see."""
    assert len(batch[0]) == 3
    return entropy(model(batch[0]), batch[1])


def test_a_loss_that_takes_one_size_is_weighted_by_what_shapes_say() -> None:
    x, y = example(3, 6, 9, 5)
    equal = HessianOperator(scorer(), picky, None, [(x, y), (x.flip(0), y)])
    assert equal._weights == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"cannot be told.*labels in batch\[1\].*count="):
        HessianOperator(scorer(), picky, None, [A, B])


@pytest.mark.parametrize("second", [0, 1])
def test_every_batch_is_checked_for_randomness_and_for_a_sum(second: int) -> None:
    model, batches = scorer(), [A, B]

    def random(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return entropy(F.dropout(logits, 0.5) if batch[0] is batches[second][0] else logits, batch[1])

    def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        mine = torch.equal(batch[0][:3], batches[second][0])
        return entropy(model(batch[0]), batch[1], reduction="sum" if mine else "mean")

    with pytest.raises(ValueError, match=rf"batches\[{second}\].*random"):
        HessianOperator(model, random, None, batches)
    with pytest.raises(ValueError, match=rf"not a mean.*batches\[{second}\]"):
        HessianOperator(model, summed, None, batches)


def test_a_mean_that_could_not_be_checked_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hessian"):
        HessianOperator(scorer(), picky, None, [A])
    assert "cannot check that the loss is a mean" in caplog.text


def test_the_cross_check_refuses_weights_in_doubt() -> None:
    with pytest.raises(ValueError, match="count="):
        pyhessian_answer(scorer(), lambda m, b: entropy(m(b[0]), b[1]), [A, B])
