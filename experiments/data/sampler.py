"""Batches that depend only on (corpus, seed, step), so that resuming and sharding need no sampler state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """Token ids in the order of the text.

    Attributes:
        train: uint8, uint16 or uint32 [n], training tokens; may be a file that is mapped into memory.
        validation: likewise [m], held-out tokens.
        vocab: number of token ids.
        fingerprint: hash of the text, which identifies it in results.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab: int
    fingerprint: str


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    rows = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(rows.astype(np.int64))


def _require_a_window(tokens: np.ndarray, length: int) -> None:
    if len(tokens) <= length + 1:
        raise ValueError(f"the corpus has {len(tokens)} tokens, too few for seq_len={length}; use a shorter seq_len")


def batch_at(tokens: np.ndarray, seed: int, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step.

    Args:
        tokens: unsigned integers [n], the training tokens.
        seed: seed of the data order.
        step: index of the step, from 0.
        rows: number of sequences.
        length: tokens per sequence.

    Returns:
        (inputs, targets), each int64 [rows, length]; targets are inputs shifted by one.

    Raises:
        ValueError: the corpus is shorter than one window.
    """
    _require_a_window(tokens, length)
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    windows = _windows(tokens, generator.integers(0, len(tokens) - length, size=rows), length + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def context_batch_at(tokens: np.ndarray, seed: int, step: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
    """Draw contexts, int64 [rows, context], and the token that follows each, int64 [rows]."""
    inputs, targets = batch_at(tokens, seed, step, rows, context)
    return inputs, targets[:, -1].contiguous()


def fixed_batches(tokens: np.ndarray, count: int, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` batches of evenly spaced windows, which are the same for every run.

    The windows overlap only if the corpus is too short for all of them.

    Args:
        tokens: unsigned integers [n], the held-out tokens.
        count: number of batches.
        rows: sequences per batch.
        length: tokens per sequence.

    Raises:
        ValueError: the corpus is shorter than one window.
    """
    _require_a_window(tokens, length)
    starts = np.linspace(0, len(tokens) - length - 1, count * rows).astype(np.int64)
    windows = _windows(tokens, starts, length + 1)
    return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows.split(rows)]


def epoch_rows(count: int, seed: int, step: int, rows: int) -> tuple[np.ndarray, np.random.Generator]:
    """Draw the examples of a step: epochs of shuffled examples, of which an incomplete last batch is left out.

    Args:
        count: number of examples.
        seed: seed of the order.
        step: index of the step, from 0.
        rows: examples per step.

    Returns:
        (their indices, int64 [rows]; a generator for further draws of this step)

    Raises:
        ValueError: there are fewer examples than rows.
    """
    if rows > count:
        raise ValueError(f"batch={rows} must be at most {count}, the number of training examples")
    epoch, place = divmod(step, count // rows)
    order = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch])).permutation(count)
    draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, step]))
    return order[place * rows : (place + 1) * rows], draw
