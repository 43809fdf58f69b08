"""What the study measures and in which order: one task per file of results. docs/real_model.md gives the reasons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

from experiments.studies.real_model.subject import Subject
from hessian.own_model import Run
from optimizer import Role

RUN = Run(steps=60, lr=1e-4, every=5)


@dataclass(frozen=True)
class Settings:
    """Sizes and numbers of samples.

    Attributes:
        tokens: tokens of a text; a product is with the curvature of their mean loss.
        draws: products per partition and sample, see ``hessian.single_probes.energies``.
        model_samples: samples of the whole model's energies, for each text.
        matrix_samples: samples of the energies of each matrix of a layer.
        matrix_draws: as ``draws``, for those samples.
        texts: texts on which the whole model's energies are measured.
        column_probes: probes per layer of the map of layers.
        map_probes: probes per block of the other maps.
        groups: groups of neurons of a map.
        slq_steps: Lanczos steps.
        slq_probes: Lanczos start vectors.
        run: the AdamW run whose second moments are averaged.
        rows: sequences per step of the run.
        run_tokens: tokens of a sequence of the run.
        moment_layers: second moments are compared in every such layer: 5 for layers 0, 5, 10, ....
        seeds: seeds of the runs.
        permutations: shuffles of second moments.
    """

    tokens: int = 128
    draws: int = 3
    model_samples: int = 3
    matrix_samples: int = 3
    matrix_draws: int = 2
    texts: tuple[int, ...] = (0, 1)
    column_probes: int = 2
    map_probes: int = 2
    groups: int = 8
    slq_steps: int = 15
    slq_probes: int = 3
    run: Run = RUN
    rows: int = 1
    run_tokens: int = 64
    moment_layers: int = 5
    seeds: tuple[int, ...] = (0, 1)
    permutations: int = 2


@dataclass(frozen=True)
class Task:
    """One file of results.

    Attributes:
        name: name of the file.
        kind: key of ``measure.KINDS``.
        matrix: "H", the Hessian, "G", the Gauss-Newton matrix, or "" where there is none.
        target: what part of the model: "model", a layer, or the name of a parameter, with the head in brackets.
        text: number of the text.
        samples: number of samples, each of which is stored when it is finished.
    """

    name: str
    kind: str
    matrix: str
    target: str
    text: int
    samples: int


def chosen_layers(subject: Subject) -> list[str]:
    """Return the middle and the last layer; a single layer is both."""
    layers = [layer for layer in dict.fromkeys(subject.layers().values()) if layer.startswith("layer ")]
    return list(dict.fromkeys([layers[len(layers) // 2], layers[-1]]))


def plan(subject: Subject, settings: Settings) -> list[Task]:
    """Return all tasks, those first that the decision rules need."""
    layers = chosen_layers(subject)
    middle, last = layers[0], layers[-1]
    turns = len(set(subject.layers().values())) * settings.column_probes
    text, *others = settings.texts

    def both(what: str, kind: str, target: str, samples: int = 1) -> list[Task]:
        return [_task(what, kind, matrix, target, text, samples) for matrix in "HG"]

    energy_h, energy_g = both("energy-model", "energy", "model", settings.model_samples)
    columns_h, columns_g = both("columns-model", "columns", "model", turns)
    runs = [Task(f"moments-{seed}", "moments", "", "model", 0, 1) for seed in settings.seeds]
    tasks = [columns_h, *both("heads", "heads", last), energy_h, runs[0]]
    matrices_h, matrices_g = both("matrices", "matrices", last, settings.matrix_samples * len(subject.matrices(last)))
    neurons_h, neurons_g = both("neurons", "neurons", last)
    tokens_h, tokens_g = both("tokens", "tokens", "model")
    spectra = _spectra(subject, last, both)
    tasks += [matrices_h, *spectra[:2], neurons_h, matrices_g, tokens_h, energy_g, *runs[1:], *spectra[2:], neurons_g]
    if middle != last:
        tasks += both("heads", "heads", middle)
        tasks += both("matrices", "matrices", middle, settings.matrix_samples * len(subject.matrices(middle)))
    tasks += [_task("energy-model", "energy", "H", "model", other, settings.model_samples) for other in others]
    return [*tasks, columns_g, tokens_g]


def _task(what: str, kind: str, matrix: str, target: str, text: int, samples: int) -> Task:
    short = target.replace("layer ", "layer").replace(" ", "-").replace("[", "-").replace("]", "")
    place = "" if target == "model" else f"-{short}"
    return Task(f"{what}{place}-{matrix}-text{text}", kind, matrix, target, text, samples)


def _spectra(subject: Subject, layer: str, both: Callable[[str, str, str], list[Task]]) -> list[Task]:
    """Return the tasks for spectra of a layer: queries, values, the MLP's output, and a head of the queries."""
    roles, tasks, heads = subject.roles(), [], []
    for name in subject.matrices(layer):
        if roles[name] in (Role.QUERY, Role.VALUE, Role.MLP_OUT):
            tasks += both("spectrum", "spectrum", name)
        if roles[name] is Role.QUERY:
            heads += both("spectrum", "spectrum", f"{name}[head 0]")
    return tasks + heads


def as_json(settings: Settings) -> dict[str, object]:
    """Return settings as a document that equals itself after it was stored."""
    document: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return document
