"""Run the study stage by stage. Stages whose inputs and code are unchanged are read from disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from experiments.commandline import refusals
from experiments.data import load
from experiments.storage import environment, write_json
from experiments.studies.hessian_maps.cache import FORMAT_VERSION, Arrays, StageCache
from experiments.studies.hessian_maps.measure import measure
from experiments.studies.hessian_maps.progress import Stages
from experiments.studies.hessian_maps.settings import CHECKPOINTS, PROFILES, Settings, subjects
from experiments.studies.hessian_maps.subjects import Subject
from hessian import Evidence, derive, js_distance
from optimizer import Rules, Unit

logger = logging.getLogger("experiments")
VOTERS = ("gpt", "llama")
CHECK_ARMS = ("elementwise", "adam_mini", "derived")
_FIELDS = {field.name for field in dataclasses.fields(Evidence)}


def run(out: Path, profile: str) -> dict[str, Any]:
    """Run the study, write its results to the folder ``out``, and return the content of ``report.json``."""
    torch.set_num_threads(1)  # With such small tensors, a second thread makes the study slower.
    started, settings = time.perf_counter(), PROFILES[profile]
    cache, corpus = StageCache(out), load("python-stdlib-8")
    all_subjects = {name: Subject(name, config, corpus, settings) for name, config in subjects(profile).items()}
    checks = [(name, arm, seed) for name in VOTERS for arm in CHECK_ARMS for seed in settings.check_seeds]
    stages = Stages(len(all_subjects) * (1 + len(CHECKPOINTS)) + len(checks))
    base = [dataclasses.asdict(settings), corpus.fingerprint]
    report: dict[str, Any] = {"subjects": {}, "evidence": [], "js": {}, "check": []}
    for subject in all_subjects.values():
        _study_one(subject, cache, stages, [*base, dataclasses.asdict(subject.config)], report)
    rules_path = _write_rules(report, settings, out)
    for name, arm, seed in checks:
        subject = all_subjects[name]
        rules = rules_path if arm == "derived" else arm
        units = {role.value: unit.value for role, unit in Rules.load(rules).units.items()}
        arrays = stages.run(
            cache,
            f"check-{name}-{arm}-{seed}",
            f"{name} with rules {arm}, seed {seed}",
            [*base, dataclasses.asdict(subject.config), units, seed],
            lambda progress, s=subject, r=rules, k=seed: s.train(r, settings.check_steps, k, progress=progress),
        )
        curve = {"step": arrays["loss_step"].tolist(), "loss": arrays["loss"].tolist()}
        report["check"].append({"model": name, "arm": arm, "seed": seed, **curve})
    stages.close()
    report |= {
        "format_version": FORMAT_VERSION,
        "profile": profile,
        "settings": dataclasses.asdict(settings),
        "files": cache.used,
        "data": {"name": "python-stdlib-8", "tokens": len(corpus.train), "fingerprint": corpus.fingerprint[:16]},
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write_json(out / "report.json", report)
    cache.prune()
    return report


def _study_one(subject: Subject, cache: StageCache, stages: Stages, inputs: list[Any], report: dict[str, Any]) -> None:
    """Train one subject, measure it at every checkpoint, and add the results to ``report``."""
    settings, name = subject.settings, subject.name
    trained = stages.run(
        cache,
        f"train-{name}",
        name,
        inputs,
        lambda progress: subject.train(
            "elementwise", settings.steps, settings.seed, progress=progress, snapshots=CHECKPOINTS
        ),
    )
    report["subjects"][name] = {
        "config": dataclasses.asdict(subject.config),
        "parameters": trained["theta"].shape[1],
        "loss_step": trained["loss_step"].tolist(),
        "loss": trained["loss"].tolist(),
    }
    for theta, checkpoint in zip(trained["theta"], CHECKPOINTS, strict=True):
        final = checkpoint == CHECKPOINTS[-1]
        arrays = stages.run(
            cache,
            f"hessian-{name}-{round(100 * checkpoint)}",
            f"{name} at {checkpoint:.0%} of training",
            [*inputs, checkpoint],
            lambda progress, t=theta, c=checkpoint, f=final: measure(subject, t, c, final=f, progress=progress),
        )
        rows = json.loads(str(arrays["rows"]))
        report["evidence"] += rows
        if final:
            report["subjects"][name]["asymmetry"] = float(arrays["asymmetry"])
            report["js"][name] = _distances(arrays)


def _distances(arrays: Arrays) -> dict[str, Any]:
    """Return the Jensen-Shannon distances between the spectra of all weight matrices."""
    names = [key.removeprefix("eig/") for key in arrays if key.startswith("eig/")]
    spectra = [torch.from_numpy(arrays[f"eig/{name}"]) for name in names]
    matrix = np.array([[js_distance(a, b) for b in spectra] for a in spectra])
    return {"names": names, "distance": matrix.round(4).tolist()}


def _write_rules(report: dict[str, Any], settings: Settings, out: Path) -> Path:
    """Derive rules from the evidence of the Transformers and save them.

    ``rules.json`` shares scalars between elements, as the shipped set does. ``rules_factored.json`` may also choose
    factored second moments. The evidence of the MLP is not used; it is measured only for comparison.
    """
    evidence = [
        Evidence(**{key: value for key, value in row.items() if key in _FIELDS})
        for row in report["evidence"]
        if row["model"] in VOTERS
    ]
    provenance = {
        "made_by": "experiments.studies.hessian_maps",
        "settings": dataclasses.asdict(settings),
        "models": {name: report["subjects"][name]["config"] for name in VOTERS},
        "data": "python-stdlib-8",
        "torch": torch.__version__,
    }
    derive(evidence, name="derived_factored", provenance=provenance).save(out / "rules_factored.json")
    rules = derive(evidence, provenance=provenance, without=(Unit.FACTORED,))
    report["rules"] = {
        "units": {r.value: u.value for r, u in rules.units.items()},
        "choices": rules.evidence["choices"],
    }
    return rules.save(out / "rules.json")


def main(out: Path = Path("out/hessian"), profile: Literal["full", "smoke"] = "full") -> None:
    """Train the models, measure their Hessians, derive rules, and check the rules by training.

    Args:
        out: output folder.
        profile: full, or smoke, which takes seconds and is for tests.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with refusals(ValueError, OSError):  # Only errors of the arguments or the text, not of the study.
        StageCache(out)
        load("python-stdlib-8")
    report = run(out, profile)
    print(f"measured in {report['seconds']} s, peak memory {report['peak_rss_mib']} MiB; rules in {out / 'rules.json'}")


if __name__ == "__main__":
    tyro.cli(main)
