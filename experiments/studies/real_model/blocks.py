"""The blocks of the maps: attention heads, groups of MLP neurons, groups of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.studies.real_model.subject import Subject
from optimizer import Role

TOKEN_GROUPS = 6
"""Groups of tokens that the text lacks, of equal size, by frequency in the training text."""


@dataclass(frozen=True)
class Blocks:
    """A partition of some parameters into labelled blocks.

    Attributes:
        names: names of the parameters, in the order of the vector.
        ids: int64 [elements], block of every element.
        labels: label of every block.
    """

    names: list[str]
    ids: Tensor
    labels: list[str]


def heads(subject: Subject, layer: str) -> Blocks:
    """Return the heads of a layer: rows of queries, keys and values, and columns of the attention output."""
    roles, matrices = subject.roles(), subject.matrices(layer)
    height = next(subject.head_dim(name) for name in matrices if roles[name] is Role.QUERY)
    names, ids, labels = [], [], []
    for role in (Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT):
        for name in (name for name in matrices if roles[name] is role):
            rows, columns = matrices[name].shape
            number = torch.arange(columns) if role is Role.ATTENTION_OUT else torch.arange(rows)[:, None]
            ids.append((number // height + len(labels)).expand(rows, columns).flatten())
            count = (columns if role is Role.ATTENTION_OUT else rows) // height
            labels += [f"{role.value} {head}" for head in range(count)]
            names.append(name)
    return Blocks(names, torch.cat(ids), labels)


def neurons(subject: Subject, layer: str, groups: int) -> Blocks:
    """Return groups of consecutive neurons of a layer's MLP: rows of the matrices in, and columns of the one out.

    Raises:
        ValueError: the number of neurons is not a multiple of groups.
    """
    roles, matrices = subject.roles(), subject.matrices(layer)
    names, ids, labels = [], [], []
    for name, matrix in matrices.items():
        if roles[name] in (Role.MLP_IN, Role.MLP_OUT):
            rows, columns = matrix.shape
            count = columns if roles[name] is Role.MLP_OUT else rows
            if count % groups:
                raise ValueError(f"groups={groups} does not divide the {count} neurons of {name}; use a divisor")
            number = torch.arange(columns) if roles[name] is Role.MLP_OUT else torch.arange(rows)[:, None]
            ids.append((number // (count // groups) + len(labels)).expand(rows, columns).flatten())
            labels += [f"{name.split('.')[-2]} {group}" for group in range(groups)]
            names.append(name)
    return Blocks(names, torch.cat(ids), labels)


def tokens(subject: Subject, text: int, length: int) -> Blocks:
    """Return groups of the token embedding's rows, by whether the text has the token, and by its frequency.

    The first two groups are the text's tokens, the more frequent half and the others. The rest is sorted by frequency
    in the training text, into groups of equal size.
    """
    name = next(name for name, role in subject.roles().items() if role is Role.TOKEN_EMBEDDING)
    vocabulary, width = subject.model.get_parameter(name).shape
    counts = np.bincount(subject.training, minlength=vocabulary)[:vocabulary]
    order = np.argsort(-counts, kind="stable")
    present = set(torch.cat([part.flatten() for part in subject.text(text, length)]).tolist())
    inside = [token for token in order if int(token) in present]
    outside = [token for token in order if int(token) not in present]
    half = len(inside) // 2
    groups = [np.array(inside[:half]), np.array(inside[half:]), *np.array_split(np.array(outside), TOKEN_GROUPS)]
    of_token = torch.empty(vocabulary, dtype=torch.int64)
    for number, group in enumerate(groups):
        of_token[torch.from_numpy(group.astype(np.int64))] = number
    labels = ["in the text, frequent", "in the text, rare"]
    labels += [f"not in the text {number + 1}" for number in range(TOKEN_GROUPS)]
    return Blocks([name], of_token.repeat_interleave(width), labels)
