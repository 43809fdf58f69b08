"""What a run leaves behind, and that nothing which happens to it on the way changes its numbers.

Whether the optimizer is right is held by the tests of ``optimizer``; these see a resumed run that differs from an
uninterrupted one, a finished run done twice, a failure that leaves no trace. Checkpoints and signals have their own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments.train as train_module
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig
from experiments.models import MLPConfig
from experiments.optimizers import require_coverage
from experiments.storage import write_json
from experiments.train import learning_rate, main, run_folder, train
from tests.experiments import processes


def metrics(root: Path, config: TrainConfig) -> list[dict[str, Any]]:
    """The records of a run without seconds."""
    return processes.metrics(run_folder(root, config.with_rules_hash()))


class _Interrupted(BaseException):
    """Not an Exception: like a kill, it is not recorded."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    whole = train_module._Run._one_step

    def step(self: Any) -> float:
        if self.step == steps:
            raise _Interrupted
        return whole(self)

    monkeypatch.setattr(train_module._Run, "_one_step", step)


# ------------------------------------------------------------------------------------------- what a run leaves


def test_results_folder_is_complete(tmp_path: Path, config: TrainConfig) -> None:
    status = train(config, tmp_path)
    folder = run_folder(tmp_path, config.with_rules_hash())
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "environment.json", "metrics.jsonl", "status.json",
    ]  # fmt: skip
    assert json.loads((folder / "status.json").read_text()) == status
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())).hash == folder.name
    records = metrics(tmp_path, config)
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    assert [r["tokens"] for r in records] == [640, 1280, 1920, 2560]
    assert status["final_val_loss"] == records[-1]["val_loss"] < records[0]["val_loss"]
    assert status["second_moment_scalars"] < 0.1 * status["parameters"]
    assert len(status["weights_sha256"]) == 64 and status["failed_checkpoints"] == 0


def test_every_arm_trains_and_arms_differ(tmp_path: Path, config: TrainConfig) -> None:
    arms = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "permuted")
    status = {arm: train(dataclasses.replace(config, arm=arm), tmp_path) for arm in arms}
    assert {s["state"] for s in status.values()} == {"finished"}
    assert len({s["final_val_loss"] for s in status.values()}) == len(arms)
    assert status["elementwise"]["second_moment_scalars"] == status["elementwise"]["parameters"]
    assert status["permuted"]["second_moment_scalars"] == status["adam_mini"]["second_moment_scalars"]


def test_elementwise_arm_is_torch_adamw(tmp_path: Path, config: TrainConfig) -> None:
    ours, torchs = (train(dataclasses.replace(config, arm=arm), tmp_path) for arm in ("elementwise", "torch_adamw"))
    assert ours["final_val_loss"] == pytest.approx(torchs["final_val_loss"], abs=1e-5)


def test_seed_changes_weights_and_data_and_nothing_else_does(tmp_path: Path, config: TrainConfig) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(dataclasses.replace(config, seed=seed), tmp_path / name)
    a, b = metrics(tmp_path / "a", config), metrics(tmp_path / "b", config)
    assert a == b
    assert metrics(tmp_path / "c", dataclasses.replace(config, seed=1))[0]["train_loss"] != a[0]["train_loss"]
    sha = {name: processes.status(next(tmp_path.glob(f"{name}/test/*")))["weights_sha256"] for name in "abc"}
    assert sha["a"] == sha["b"] != sha["c"]


def test_mlp_trains_on_contexts(tmp_path: Path, config: TrainConfig) -> None:
    small = dataclasses.replace(config, model=MLPConfig(), data="python-stdlib-8", seq_len=8)
    assert train(small, tmp_path)["state"] == "finished"


def test_learning_rate_rises_and_falls_linearly(config: TrainConfig) -> None:
    config = dataclasses.replace(config, lr=1.0, steps=20, warmup=0.1)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[10] == pytest.approx(10 / 18) and rates[19] == pytest.approx(1 / 18)


# ------------------------------------------------------------------------------------------------ interruptions


def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, config: TrainConfig) -> None:
    config = dataclasses.replace(config, steps=200)
    folder, log = run_folder(tmp_path / "killed", config.with_rules_hash()), tmp_path / "log.txt"
    process = processes.start(processes.command(config, tmp_path / "killed"), log)
    processes.wait_until(lambda: processes.steps(folder), process, log=log)
    processes.kill([process])
    assert not (folder / "status.json").exists()
    assert 0 < processes.steps(folder)[-1] < 200
    resumed, straight = train(config, tmp_path / "killed"), train(config, tmp_path / "straight")
    assert resumed["final_val_loss"] == straight["final_val_loss"]
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert metrics(tmp_path / "killed", config) == metrics(tmp_path / "straight", config)


@pytest.mark.parametrize("arm", ["adam_mini", "permuted", "torch_adamw"])
def test_interrupted_between_checkpoints(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    config = dataclasses.replace(config, arm=arm, eval_every=3)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        with pytest.raises(_Interrupted):
            train(config, tmp_path / "interrupted")
    # Records after the checkpoint (step 10) are on disk already; they must be neither lost nor doubled.
    assert [r["step"] for r in metrics(tmp_path / "interrupted", config)] == [3, 6, 9, 12]
    train(config, tmp_path / "interrupted")
    train(config, tmp_path / "straight")
    assert metrics(tmp_path / "interrupted", config) == metrics(tmp_path / "straight", config)


# --------------------------------------------------------------------------------------------------- endings


def test_finished_run_is_not_run_again(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(config, tmp_path)
    interrupt_after(monkeypatch, 0)
    assert train(config, tmp_path) == first


def test_failed_run_is_recorded_and_tried_again(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> float:
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_one_step", broken)
        with pytest.raises(RuntimeError, match="disk on fire"):
            train(config, tmp_path)
    status = json.loads((run_folder(tmp_path, config.with_rules_hash()) / "status.json").read_text())
    assert status["state"] == "failed" and "disk on fire" in status["error"]
    assert train(config, tmp_path)["state"] == "finished"


@pytest.mark.parametrize("last", [True, False])
def test_divergence_is_a_result(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    whole, at = train_module._Run._one_step, 20 if last else 9

    def step(self: Any) -> float:
        loss = whole(self)
        if self.step == at:  # the weights are spoiled by this step; its own loss is still finite
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(train_module._Run, "_one_step", step)
    status = train(config, tmp_path)
    assert (status["state"], status["final_val_loss"]) == ("diverged", None)
    assert train(config, tmp_path) == status


def test_other_format_version_is_refused_by_name(tmp_path: Path, config: TrainConfig) -> None:
    folder = run_folder(tmp_path, config.with_rules_hash())
    write_json(folder / "status.json", {"state": "finished", "format_version": FORMAT_VERSION + 1})
    with pytest.raises(ValueError, match=rf"format_version={FORMAT_VERSION + 1}.*another --results folder"):
        train(config, tmp_path)


def test_damaged_status_is_named(tmp_path: Path, config: TrainConfig) -> None:
    folder = run_folder(tmp_path, config.with_rules_hash())
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "fini')
    with pytest.raises(ValueError, match=r"status\.json is damaged.*delete its folder"):
        train(config, tmp_path)


def test_optimizer_that_misses_a_parameter_is_refused(config: TrainConfig) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="holds 2 parameters, the model has 4"):
        require_coverage(model, torch.optim.SGD(model[0].parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", -1.0), ("clip", float("nan")), ("lr", -1e-3), ("lr", float("inf")), ("beta1", 1.0), ("beta2", -0.1),
        ("weight_decay", -0.1), ("warmup", 1.0), ("seed", -1), ("checkpoint_every", -1), ("steps", 0),
    ],
)  # fmt: skip
def test_every_number_of_a_config_has_its_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        dataclasses.replace(CONFIGS["smoke"](), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("n_heads", -1), ("rope_base", float("nan"))])
def test_every_size_of_a_model_has_its_range(name: str, value: float) -> None:
    smoke = CONFIGS["smoke"]()
    with pytest.raises(ValueError, match=f"model.{name}="):
        dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, **{name: value}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--clip", "-1", "clip=-1.0"), ("--model.dim", "0", "model.dim=0"), ("--seed", "-1", "seed=-1"),
     ("--arm", "nothing", "nothing")],
)  # fmt: skip
def test_the_command_line_names_a_bad_value_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["experiments.train", "smoke", option, value])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (None, 0)
    assert message in f"{ended.value.code} {capsys.readouterr()}"
