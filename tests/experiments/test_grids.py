"""Grids: every study's runs are distinct, seeds come in order, and settings and grown rates are where they belong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from experiments.configs import of_workloads, smoke
from experiments.grids import EIGHT, MODELS_BY_SIZE, STUDIES, Study, grid, names
from experiments.models import build
from experiments.workloads import WORKLOADS


@pytest.mark.parametrize("study", STUDIES)
def test_no_run_is_there_twice_and_names_tell_runs_apart(study: str) -> None:
    configs = grid("cpu", study=study)
    assert len({config.hash for config in configs}) == len(configs) == len(set(names(configs)))
    assert {config.arm for config in configs} == set(STUDIES[study].arms)
    assert {config.experiment for config in configs} == {f"{study}_cpu"}
    first = [
        config.seed for config in configs if config.lr not in {r for g in STUDIES[study].grown.values() for r in g}
    ]
    assert first == sorted(first), "an interrupted study has all arms of its first seeds"


@pytest.mark.parametrize("study", STUDIES)
def test_smoke_has_one_run_of_every_arm(study: str) -> None:
    configs = grid("smoke", study=study)
    assert Counter(config.arm for config in configs) == dict.fromkeys(STUDIES[study].arms, 1)
    assert all(config.model == STUDIES[study].small().model for config in configs)


def test_every_arm_runs_in_every_setting() -> None:
    settings = {"a": {"clip": 0.0}, "b": {"warmup": 0.5}}
    study = Study(smoke, ("x", "y"), (1.0, 2.0), (0, 1), own={"y": (9.0,)}, grown={"x": (4.0,)}, settings=settings)
    runs = study.runs(study.arms)
    assert Counter(runs) == {
        (seed, setting, lr, arm): 1
        for seed in (0, 1)
        for setting in settings
        for lr, arm in ((1.0, "x"), (2.0, "x"), (4.0, "x"), (9.0, "y"))
    }


def test_names_have_fields_that_one_setting_leaves_at_their_default() -> None:
    configs = [replace(smoke(), eps=eps, precision=how) for eps in (1e-8, 1e-6) for how in ("fp32", "bf16")]
    wanted = [f"adam_mini 0.003 0 precision={how} eps={eps}" for eps in ("1e-08", "1e-06") for how in ("fp32", "bf16")]
    assert names(configs) == wanted
    assert set(names(configs[::-1])) == set(wanted)


def test_lengths_are_in_tokens_per_parameter() -> None:
    for name, setting in STUDIES["length"].settings.items():
        size, ratio = name.split(", ")
        model = build(MODELS_BY_SIZE[size], 0)
        tokens = setting["steps"] * STUDIES["length"].base().batch * STUDIES["length"].base().seq_len
        parameters = sum(p.numel() for p in model.parameters())
        assert tokens / parameters == pytest.approx(int(ratio.split()[0]), rel=0.01)
        assert parameters == pytest.approx(float(size.removesuffix("M")) * 1e6, rel=0.1)


def test_the_record_varies_warm_up_and_clipping() -> None:
    configs = grid("cpu", study="record")
    assert {(c.warmup, c.clip) for c in configs} == {(w, c) for w in (0.0, 0.02, 0.1) for c in (0.0, 1.0)}
    assert len(configs) == 360 and tuple(range(8)) == EIGHT


def test_a_workload_by_its_name_has_a_rate_of_its_grid() -> None:
    for name, workload in WORKLOADS.items():
        config = of_workloads()[name]
        assert config.lr in workload.rates and config.experiment == f"single_{name}"
