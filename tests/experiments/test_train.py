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
from experiments.configs import CONFIGS, FORMAT_VERSION, TrainConfig, smoke
from experiments.models import GPTConfig, LlamaConfig, MLPConfig, build
from experiments.optimizers import make_optimizer, require_coverage
from experiments.parallel import weights_sha256
from experiments.storage import write_json
from experiments.tasks import LanguageModelling
from experiments.train import Refused, learning_rate, main, run_folder, train
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


def showing(monkeypatch: pytest.MonkeyPatch, **documents: Any) -> None:
    """Give the task of language models artefacts; a document that is a function is called with the task."""

    def artefacts(task: Any, *, casting: Any) -> dict[str, Any]:
        with casting():
            return {name: made(task) if callable(made) else made for name, made in documents.items()}

    monkeypatch.setattr(LanguageModelling, "artefacts", artefacts, raising=False)


def test_a_finished_run_leaves_what_its_task_shows(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artefacts are of the last weights, and an interrupted run or one that diverged has none."""
    showing(monkeypatch, samples=lambda task: {"hash": weights_sha256(task.model)})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        with pytest.raises(_Interrupted):
            train(config, tmp_path)
    folder = run_folder(tmp_path, config.with_rules_hash())
    assert not (folder / "samples.json").exists()
    status = train(config, tmp_path)
    assert json.loads((folder / "samples.json").read_text()) == {"hash": status["weights_sha256"]}
    wild = dataclasses.replace(config, lr=1e30, clip=0.0)
    assert train(wild, tmp_path)["state"] == "diverged"
    assert not (run_folder(tmp_path, wild.with_rules_hash()) / "samples.json").exists()


@pytest.mark.parametrize("name", ["status", "../samples", "samples.json", ""])
def test_an_artefact_takes_no_name_of_a_runs_own_files(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    showing(monkeypatch, **{name: 1})
    with pytest.raises(ValueError, match="needs another name"):
        train(config, tmp_path)
    showing(monkeypatch, samples=1)
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


@pytest.mark.parametrize("text", ["[]", "3", '"finished"', "{}", '{"state": null}', '{"state": "a", "state": "b"}'])
def test_a_status_that_names_no_state_is_damaged(tmp_path: Path, config: TrainConfig, text: str) -> None:
    """An empty list was taken for no status by one reader, and crashed another."""
    folder = run_folder(tmp_path, config.with_rules_hash())
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(text)
    for read in (train_module.finished, train_module.read_status):
        with pytest.raises(ValueError, match=r"status\.json is damaged.*delete its folder"):
            read(folder)


# ---------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", -1.0), ("clip", float("nan")), ("lr", -1e-3), ("lr", float("inf")), ("beta1", 1.0), ("beta2", -0.1),
        ("beta1", float("nan")), ("weight_decay", -0.1), ("weight_decay", float("nan")), ("warmup", 1.0),
        ("warmup", float("nan")), ("seed", -1), ("seed", 2**63), ("seed", 0.5), ("seed", True),
        ("checkpoint_every", -1), ("checkpoint_every", 1.5), ("steps", 0), ("steps", float("nan")), ("steps", "20"),
        ("batch", 0), ("batch", 2.0), ("seq_len", 0), ("eval_every", 0), ("eval_batches", 0), ("lr", "0.1"),
        ("lr", None), ("experiment", ""), ("experiment", "../elsewhere"), ("experiment", "a/b"), ("experiment", ".x"),
    ],
)  # fmt: skip
def test_every_number_of_a_config_has_its_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        dataclasses.replace(CONFIGS["smoke"](), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 0), ("n_heads", -1), ("rope_base", float("nan")), ("rope_base", float("inf")), ("rope_base", 0.0),
     ("vocab", 0), ("n_layers", 0), ("hidden", 1.5), ("n_kv_heads", True)],
)  # fmt: skip
def test_every_size_of_a_model_has_its_range(name: str, value: float) -> None:
    smoke = CONFIGS["smoke"]()
    with pytest.raises(ValueError, match=f"model.{name}="):
        dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, **{name: value}))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (LlamaConfig(dim=32, n_heads=3), {}, "dim=32 must be a multiple of n_heads=3"),
        (LlamaConfig(dim=32, n_heads=4, n_kv_heads=3), {}, "n_kv_heads=3"),
        (LlamaConfig(dim=6, n_heads=2, n_kv_heads=1), {}, "dim=6 / n_heads=2 = 3 must be even"),
        (GPTConfig(n_embd=10, n_head=4), {}, "n_embd=10 must be a multiple of n_head=4"),
        (GPTConfig(block_size=16), {"seq_len": 17}, "seq_len=17 must be at most model.block_size=16"),
        (GPTConfig(tied=1), {}, "model.tied=1 must be true or false"),  # type: ignore[arg-type]
        (MLPConfig(context=8), {"seq_len": 9}, "seq_len=9 must be model.context=8"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(model: Any, more: dict[str, Any], message: str) -> None:
    """A head of odd width was rotated into a wider one, silently; the others were tracebacks out of the model."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["smoke"](), model=model, **more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("steps"), r"lacks \['steps'\]"), (lambda d: d.update(stepps=1), r"unknown keys \['stepps'\]"),
        (lambda d: d.update(steps="20"), "steps='20' must be a whole number"),
        (lambda d: d["model"].update(kind="Lama"), "kind is one of"), (lambda d: d.update(model=3), "model=3"),
        (lambda d: d["model"].pop("dim"), r"the model .* lacks \['dim'\]"),
    ],
)  # fmt: skip
def test_a_config_from_a_file_is_checked(config: TrainConfig, change: Any, message: str) -> None:
    document = config.to_dict()
    change(document)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(document)


def test_data_that_do_not_fit_the_model_are_refused(tmp_path: Path, config: TrainConfig) -> None:
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=8))
    with pytest.raises(Refused, match=r"model\.vocab=8 must be at least 256, the tokens of data='python-stdlib'"):
        train(small, tmp_path)
    with pytest.raises(Refused, match="too few for seq_len=1000000000; use a shorter"):
        train(dataclasses.replace(config, seq_len=10**9), tmp_path)


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> SystemExit:
    monkeypatch.setattr("sys.argv", ["experiments.train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--clip", "-1", "clip=-1.0"), ("--model.dim", "0", "model.dim=0"), ("--seed", "-1", "seed=-1"),
     ("--seed", str(10**20), "seed=1"), ("--arm", "nothing", "nothing"), ("--lr", "nan", "lr=nan"),
     ("--model.n-heads", "3", "n_heads=3"), ("--data", "poems", "data='poems'"), ("--keep", "0", "keep=0"),
     ("--threads", "-1", "threads=-1"), ("--parallel", "fsdp2", "parallel='fsdp2' needs a process group"),
     ("--device", "cuda", "device='cuda'"), ("--model.vocab", "8", "model.vocab=8"), ("--experiment", "../x", "'../x'"),
     ("--results", "/proc/nowhere", "results=/proc/nowhere cannot be written"),
     ("--seq-len", str(10**9), f"seq_len={10**9}")],
)  # fmt: skip
def test_the_command_line_names_a_bad_value_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended, said = command_line(monkeypatch, "smoke", option, value), capsys.readouterr().err
    assert ended.code == 2 and message in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("option", ["--rules-hash", "--format-version"])
def test_what_the_trainer_fills_in_is_no_option(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """A run of another format version could be written, and never be read again."""
    assert command_line(monkeypatch, "smoke", option, "3").code == 2


def test_an_error_in_the_work_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> float:
        raise ValueError("not a matter of arguments")

    monkeypatch.setattr(train_module._Run, "_one_step", broken)
    monkeypatch.setattr("sys.argv", ["experiments.train", "smoke", "--results", str(tmp_path)])
    with pytest.raises(ValueError, match="not a matter of arguments") as error:
        main()
    assert not isinstance(error.value, Refused)


def test_eps_reaches_adamw_and_rule_sets_and_nothing_else() -> None:
    model = build(smoke().model, 0)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "seed": 0}
    for arm in ("torch_adamw", "adam_mini", "factored"):
        assert {g["eps"] for g in make_optimizer(model, arm, eps=1e-4, **settings).param_groups} == {1e-4}
    with pytest.raises(ValueError, match=r"eps=0\.0001 is for AdamW and rule sets; arm='lion'"):
        make_optimizer(model, "lion", eps=1e-4, **settings)
    assert dataclasses.replace(smoke(), eps=1e-8).hash == smoke().hash != dataclasses.replace(smoke(), eps=1e-4).hash


def test_eps_reaches_the_run(tmp_path: Path) -> None:
    """With a large eps the steps are tiny, so the loss hardly moves."""
    config = dataclasses.replace(smoke(), steps=10)
    moved, still = (train(dataclasses.replace(config, eps=eps), tmp_path)["final_val_loss"] for eps in (1e-8, 1e3))
    first = train(dataclasses.replace(config, lr=0.0), tmp_path)["final_val_loss"]
    assert abs(still - first) < 5e-3 < 0.1 < abs(moved - first)  # weight decay alone moves it by 0.0015
