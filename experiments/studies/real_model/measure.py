"""What a task measures: ``KINDS`` maps its kind to a function that prepares it and returns how to take one sample.

A sample is JSON-able and depends on the task, the settings and its number alone, so it can be taken at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor

from experiments.studies.real_model.blocks import Blocks, heads, neurons, tokens
from experiments.studies.real_model.moments import moments
from experiments.studies.real_model.partitions import partitions
from experiments.studies.real_model.plan import Settings, Task
from experiments.studies.real_model.subject import Subject
from hessian import block_norms, slq
from hessian.linear import LinearMap, PrincipalBlock
from hessian.single_probes import WHOLE, Signs, block_columns, energies

HEADS = ("QUERY", "KEY", "VALUE")
TOGETHER = 4
"""Products with a part of the model that are computed at a time. Those with the whole model are computed one by one:
two of them take twice the memory and save no time."""
Sample = Callable[[int], dict[str, Any]]


def rounded(values: Tensor, digits: int = 6) -> Any:
    """Return a tensor as nested lists of numbers with some significant digits."""
    if values.dim() == 0:
        return float(f"{float(values):.{digits}g}")
    return [rounded(value, digits) for value in values]


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be sampled.

    Attributes:
        facts: what the samples' numbers belong to, stored once.
        sample: number of a sample, from 0 -> the sample.
    """

    facts: dict[str, Any]
    sample: Sample


def _together(task: Task) -> int:
    return 1 if task.target == "model" else TOGETHER


def _operator(subject: Subject, settings: Settings, task: Task, names: list[str] | None) -> LinearMap:
    return subject.operator(
        task.matrix,
        subject.text(task.text, settings.tokens),
        names,
        mean_check=False,
        chunk=2 if task.target == "model" else 4,
    )


def _parameters(subject: Subject, names: list[str]) -> list[dict[str, Any]]:
    """Describe parameters for the results."""
    roles, layers, all_of_them = subject.roles(), subject.layers(), dict(subject.model.named_parameters())
    return [
        {"name": name, "role": roles[name].value, "layer": layers[name], "shape": list(all_of_them[name].shape)}
        for name in names
    ]


def energy(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare samples of the energy inside blocks of the whole model, with the sums of every parameter.

    There is no measured control of random blocks: its permutation costs more than products, and its mean is known from
    the diagonal. Heads are left out: beside the other tensors they change nothing that could be seen.
    """
    names = list(subject.layers())
    operator = _operator(subject, settings, task, names)
    parameters = _parameters(subject, names)
    chosen = {name: p for name, p in partitions(subject.model, names).items() if name not in ("layer", "head")}
    signs = {name: p.signs for name, p in chosen.items()}

    def sample(number: int) -> dict[str, Any]:
        found = energies(operator, signs, _sizes(parameters), number, settings.draws)
        return {name: rounded(values) for name, values in found.items()}

    return Prepared({"parameters": parameters, "squares": {n: p.squares for n, p in chosen.items()}}, sample)


def matrices(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare samples of the energy inside blocks of the matrices of a layer, each by itself; they take turns.

    ``whole`` is the squared norm of the blocks between the matrix and all matrices of the layer, the rest the energy
    inside the matrix's own block.
    """
    names = list(subject.matrices(task.target))
    operator = _operator(subject, settings, task, names)
    parameters = _parameters(subject, names)
    sizes, squares = _sizes(parameters), partitions(subject.model, names, control=0)
    ends = list(itertools.accumulate(sizes))

    def sample(number: int) -> dict[str, Any]:
        own = number % len(names)
        left_out = {"layer", "tensor"} if parameters[own]["role"] in HEADS else {"layer", "tensor", "head"}
        chosen = partitions(subject.model, [names[own]], control=number)
        inside = (ends[own] - sizes[own], ends[own])
        signs = {n: _placed(p.signs, inside, ends[-1]) for n, p in chosen.items() if n not in left_out}
        found = energies(operator, signs, sizes, number, settings.matrix_draws, TOGETHER, inside)
        energy_of = {name: rounded(values[own]) for name, values in found.items() if name != WHOLE}
        return {"parameter": names[own], WHOLE: rounded(found[WHOLE]), **energy_of}

    return Prepared({"parameters": parameters, "squares": {n: p.squares for n, p in squares.items()}}, sample)


def _placed(signs: Signs, inside: tuple[int, int], n: int) -> Signs:
    """Return the signs of a partition of a range of parameters as those of all n, 1 outside of it."""

    def draw(generator: Generator) -> Tensor:
        out = torch.ones(n, dtype=torch.int8)
        out[inside[0] : inside[1]] = signs(generator)
        return out

    return draw


def _sizes(parameters: list[dict[str, Any]]) -> list[int]:
    return [prod(p["shape"]) for p in parameters]


def columns(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare samples of the block norms between one layer and all parameters; the layers take turns."""
    operator = _operator(subject, settings, task, None)
    parameters = _parameters(subject, list(subject.layers()))
    sizes = _sizes(parameters)
    order = list(dict.fromkeys(p["layer"] for p in parameters))
    if [p["layer"] for p in parameters] != sorted((p["layer"] for p in parameters), key=order.index):
        raise ValueError("the parameters of a layer do not follow each other; this model needs another numbering")

    of_layer = [sum(n for n, p in zip(sizes, parameters, strict=True) if p["layer"] == layer) for layer in order]
    ends = list(itertools.accumulate(of_layer))
    ranges = list(zip([0, *ends], ends, strict=False))

    def sample(number: int) -> dict[str, Any]:
        layer = number % len(order)
        found = block_columns(operator, [ranges[layer]], sizes, number)[0]
        return {"layer": order[layer], "squares": rounded(found, 5)}

    return Prepared({"parameters": parameters, "layers": order}, sample)


def _block_map(subject: Subject, settings: Settings, task: Task, blocks: Blocks) -> Prepared:
    operator = _operator(subject, settings, task, blocks.names)

    def sample(number: int) -> dict[str, Any]:
        found = block_norms(operator, blocks.ids, settings.map_probes, number, chunk=_together(task))
        return {"mean": rounded(found.mean, 5), "stderr": rounded(found.stderr, 3)}

    return Prepared({"labels": blocks.labels, "sizes": torch.bincount(blocks.ids).tolist()}, sample)


def head_map(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare the map of a layer's attention heads: queries, keys, values, and the outputs' inputs."""
    return _block_map(subject, settings, task, heads(subject, task.target))


def neuron_map(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare the map of groups of a layer's MLP neurons."""
    return _block_map(subject, settings, task, neurons(subject, task.target, settings.groups))


def token_map(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare the map of groups of the token embedding's rows."""
    return _block_map(subject, settings, task, tokens(subject, task.text, settings.tokens))


def spectrum(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare the spectral density of a matrix's block, or of one head of it."""
    name, _, head = task.target.partition("[head ")
    operator = _operator(subject, settings, task, [name])
    if head:
        height = subject.head_dim(name)
        width = operator.shape[0] // subject.model.get_parameter(name).shape[0]
        first = int(head.rstrip("]")) * height * width
        operator = PrincipalBlock(operator, torch.arange(first, first + height * width))

    def sample(number: int) -> dict[str, Any]:
        found = slq(operator, settings.slq_steps, settings.slq_probes, number)
        return {"nodes": rounded(found.nodes), "weights": rounded(found.weights)}

    return Prepared({"role": subject.roles()[name].value, "order": operator.shape[0]}, sample)


def second_moments(subject: Subject, settings: Settings, task: Task) -> Prepared:
    """Prepare the AdamW run whose seed is the number behind the task's name, and what its second moments lose."""
    return Prepared({}, lambda number: moments(subject, settings, int(task.name.split("-")[1])))


USED = ("tokens",)
KINDS: Mapping[str, tuple[Callable[[Subject, Settings, Task], Prepared], tuple[str, ...]]] = {
    "energy": (energy, (*USED, "draws")),
    "matrices": (matrices, (*USED, "matrix_draws")),
    "columns": (columns, USED),
    "heads": (head_map, (*USED, "map_probes")),
    "neurons": (neuron_map, (*USED, "map_probes", "groups")),
    "tokens": (token_map, (*USED, "map_probes")),
    "spectrum": (spectrum, (*USED, "slq_steps", "slq_probes")),
    "moments": (second_moments, ("rows", "run_tokens", "run", "moment_layers", "permutations")),
}
"""Kind -> (what prepares it, the settings that its samples depend on)."""
