"""Checkpoints: whole or not used, taken at a step and not after it, kept when the disk is full, read by any ranks.

The tests of ``train`` see whether a run goes on at all; these see a checkpoint that is damaged and believed, weights of
a later step in it, a write that costs the checkpoint before it, names that only one number of ranks understands.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import experiments.train as train_module
from experiments.checkpoints import Checkpoints, State
from experiments.configs import TrainConfig, smoke
from experiments.parallel import Team
from experiments.train import Options, run_folder, train
from optimizer import AdamMini
from tests.experiments.interrupted_runs import sigterm_at, stopped, trained
from tests.experiments.processes import metrics, steps, torn
from tests.sharding.workers import run

ALONE = Team(0, 1, "alone", torch.device("cpu"))
IDENTITY = {"config": "a config", "data": "a text"}


def made(width: int = 8) -> State:
    model = nn.Linear(width, width)
    optimizer = AdamMini(model)
    model(torch.randn(3, width)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return State(model, optimizer)


def copied(state: State) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def two_checkpoints(config: TrainConfig, root: Path) -> Path:
    """A run that was stopped after step 13, with checkpoints of steps 10 and 13."""
    with sigterm_at(13):
        assert train(config, root)["state"] == "interrupted"
    folder = run_folder(root, config.with_rules_hash())
    assert steps(folder) == [10, 13] and torn(folder) == []
    return folder


# ------------------------------------------------------------------------------------------------------ damage


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "cut": (_cut, "__0_0.distcp", "__0_0.distcp has"),
    "flipped": (_flip, "__0_0.distcp", "__0_0.distcp has other content"),
    "missing": (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
    "no metadata": (Path.unlink, ".metadata", ".metadata is missing"),
    "no manifest": (Path.unlink, "manifest.json", "no manifest"),
    "cut manifest": (_cut, "manifest.json", "the manifest cannot be read"),
    "other step": (lambda p: p.write_text(p.read_text().replace('"step": 13', '"step": 12')), "manifest.json",
                   "the manifest was changed"),
    "no object": (lambda p: p.write_text("[]"), "manifest.json", "the manifest cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, config: TrainConfig, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    folder = two_checkpoints(config, tmp_path / "a")
    damage, name, reason = DAMAGE[how]
    damage(folder / "checkpoints" / "step-000013" / name)
    with caplog.at_level(logging.INFO):
        again = train(config, tmp_path / "a")
    assert f"step-000013 is torn or damaged ({reason}" in caplog.text and "at step 10" in caplog.text
    straight = train(config, tmp_path / "b")
    assert again["weights_sha256"] == straight["weights_sha256"]
    assert metrics(folder) == metrics(run_folder(tmp_path / "b", config.with_rules_hash()))


def test_with_every_checkpoint_damaged_a_run_starts_again(tmp_path: Path, config: TrainConfig) -> None:
    folder = two_checkpoints(config, tmp_path / "a")
    for path in (folder / "checkpoints").glob("step-*"):
        _flip(path / "__0_0.distcp")
    assert train(config, tmp_path / "a")["weights_sha256"] == train(config, tmp_path / "b")["weights_sha256"]


def test_leftovers_of_a_write_are_removed(tmp_path: Path, config: TrainConfig) -> None:
    folder = two_checkpoints(config, tmp_path)
    leftover = folder / "checkpoints" / ".step-000015.tmp-1234"
    shutil.copytree(folder / "checkpoints" / "step-000013", leftover)
    (folder / ".metrics.jsonl.77.tmp").write_text("{")
    with sigterm_at(14):
        assert train(config, tmp_path)["steps"] == 14
    assert not leftover.exists() and not (folder / ".metrics.jsonl.77.tmp").exists()
    assert steps(folder) == [13, 14]


@pytest.mark.parametrize("key", IDENTITY)
def test_another_runs_checkpoint_is_refused(tmp_path: Path, key: str) -> None:
    one = Checkpoints(tmp_path, IDENTITY, ALONE)
    one.save(made(), 5, {})
    assert one.wait()
    with pytest.raises(ValueError, match=f"belongs to {key} {IDENTITY[key]}, this run has another; delete it"):
        Checkpoints(tmp_path, {**IDENTITY, key: "another"}, ALONE).newest()


def test_what_only_looks_like_a_checkpoint_is_left_alone(
    tmp_path: Path, config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder ``step-abc`` ended the run with "invalid literal for int()"."""
    folder = two_checkpoints(config, tmp_path / "a")
    for name in ("step-abc", "step-", "step--5", "step-000010.bak", "step-000013 (copy)"):
        (folder / "checkpoints" / name).mkdir()
    (folder / "checkpoints" / "step-000099").write_text("a file, no folder")
    with caplog.at_level(logging.INFO), sigterm_at(14):
        assert train(config, tmp_path / "a")["steps"] == 14
    assert "step-abc is no checkpoint's name (step- and digits): left alone" in caplog.text
    assert "step-000099 is torn or damaged (no manifest)" in caplog.text and "at step 13" in caplog.text
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-abc", "step-000010.bak", "step-000014"} <= left
    assert not [name for name in left if "000099" in name]


# ------------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    """They are spoiled as soon as ``save`` returns, long before 100 MB are written."""
    state, checkpoints = made(3000), Checkpoints(tmp_path, IDENTITY, ALONE)
    wanted = copied(state)
    moments = state.optimizer.state[state.model.weight]["exp_avg"].clone()  # type: ignore[index]
    records = [1]
    checkpoints.save(state, 1, {"records": records})
    records.append(2)
    with torch.no_grad():
        for p in state.model.parameters():
            p.fill_(float("nan"))
            state.optimizer.state[p]["exp_avg"].fill_(float("nan"))
    assert steps_of(tmp_path) == [], "the write was over before the weights were spoiled: nothing is shown"
    assert checkpoints.wait()
    fresh, found = made(3000), checkpoints.newest()
    assert found is not None and found.manifest["progress"] == {"records": [1]}
    checkpoints.load(found, fresh)
    assert all(torch.equal(p, wanted[name]) for name, p in fresh.model.named_parameters())
    assert torch.equal(fresh.optimizer.state[fresh.model.weight]["exp_avg"], moments)  # type: ignore[index]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_a_second_write_waits_for_the_first_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    state, checkpoints = made(1000), Checkpoints(tmp_path, IDENTITY, ALONE, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, step, {"at": step})
        assert steps_of(tmp_path) == [s for s in (step - 2, step - 1) if s > 0]
    checkpoints.wait()
    assert steps_of(tmp_path) == [3, 4]
    found = checkpoints.newest()
    assert found is not None and found.step == 4 and found.manifest["progress"] == {"at": 4}


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    state, checkpoints = made(), Checkpoints(tmp_path, IDENTITY, ALONE)
    for at in ("first", "again"):
        checkpoints.save(state, 5, {"at": at})
        assert checkpoints.wait()
    assert checkpoints.newest().manifest["progress"] == {"at": "again"}  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_random_generators_go_on(tmp_path: Path) -> None:
    state, checkpoints = made(), Checkpoints(tmp_path, IDENTITY, ALONE)
    torch.manual_seed(5)
    torch.rand(3)
    checkpoints.save(state, 1, {})
    wanted = torch.rand(4)
    checkpoints.wait()
    torch.manual_seed(6)
    checkpoints.load(checkpoints.newest(), state)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(4), wanted)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpoints(tmp_path, IDENTITY, ALONE, keep=0)


# ---------------------------------------------------------------------------------------------------- full disk


class _Disk:
    """A disk that can be full. A file system of 4 MB where this process may mount one; else its limit of file size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
        self.mounted = made.returncode == 0
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.limit[1]))
            return
        left = shutil.disk_usage(self.folder).free
        (self.folder / "ballast").write_bytes(b"\0" * (left - 60_000))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
        (self.folder / "ballast").unlink(missing_ok=True)

    def end(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture(params=["mounted", "limited"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[_Disk]:
    disk = _Disk(tmp_path / "disk")
    if request.param == "limited" and disk.mounted:  # both ways where both are possible
        subprocess.run(["umount", str(disk.folder)], check=True)
        disk.mounted = False
    yield disk
    disk.end()


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(
    disk: _Disk, tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, seen = train_module._Run._one_step, {}
    folder = run_folder(disk.folder, config.with_rules_hash())

    def one_step(self: Any) -> float:
        loss = whole(self)
        if self.step in (6, 11):  # what was begun at step 5 or 10 is over
            self.checkpoints.wait()
            seen[self.step] = (steps(folder), torn(folder), [p.name for p in (folder / "checkpoints").glob(".*")])
        if self.step == 6:
            disk.fill()
        if self.step == 11:
            disk.free()
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_one_step", one_step)
        status = train(config, disk.folder)
    assert seen == {6: ([5], [], []), 11: ([5], [], [])}  # the one before is whole, the failed one is gone
    assert (status["state"], status["failed_checkpoints"]) == ("finished", 1)
    assert "the checkpoint of step 10 was not written, training goes on" in caplog.text
    assert status["weights_sha256"] == train(config, tmp_path / "b")["weights_sha256"]
    assert [r["step"] for r in metrics(folder)] == [5, 10, 15, 20]


# ------------------------------------------------------------------------------------------- from ranks to ranks

SETUPS = {"alone": (1, "ddp"), "ddp on 2": (2, "ddp"), "fsdp2 on 2": (2, "fsdp2"), "fsdp2 on 3": (3, "fsdp2")}
CONFIG = dataclasses.replace(smoke(), experiment="test", batch=6, steps=12, eval_every=3, checkpoint_every=4)
REFUSED = {
    "permuted": (dataclasses.replace(CONFIG, arm="permuted"), "fsdp2", "arm='permuted' gathers blocks by element"),
    "odd": (dataclasses.replace(CONFIG, batch=5), "ddp", "batch=5 does not divide over 2 processes"),
}


def _on(world: int, cases: dict[str, Any]) -> dict[str, Any]:
    """Functions of ``interrupted_runs`` on some ranks, or in this process; what each rank answered."""
    if world > 1:
        return run(world, {n: (f"tests.experiments.interrupted_runs:{f}", a) for n, (f, a) in cases.items()})
    here = {"stopped": stopped, "trained": trained}
    return {name: [here[function](**arguments)] for name, (function, arguments) in cases.items()}


shares_the_ranks = pytest.mark.xdist_group("checkpoints from ranks to ranks")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs stopped after step 6 in every setup and finished in every setup: "from > to" -> what the ranks say."""
    root = tmp_path_factory.mktemp("moved")

    def stops(world: int) -> dict[str, Any]:
        return {
            name: ("stopped", {"config": CONFIG, "root": str(root / name), "parallel": how, "step": 6})
            for name, (ranks, how) in SETUPS.items()
            if ranks == world
        }

    def ends(world: int) -> dict[str, Any]:
        cases = {}
        for new, how in ((name, how) for name, (ranks, how) in SETUPS.items() if ranks == world):
            for name, source in [(f"{old} > {new}", str(root / old)) for old in SETUPS] + [(f"straight {new}", "")]:
                place = {"root": str(root / name), "parallel": how, "source": source}
                cases[name] = ("trained", {"config": CONFIG, **place})
        return cases

    refused = {
        name: ("trained", {"config": config, "root": str(root / "refused"), "parallel": how})
        for name, (config, how, _) in REFUSED.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:  # three ranks, then two (which go on from three's), then three again, and this process
        return {
            **_on(3, stops(3)), **_on(1, stops(1)), **_on(2, {**stops(2), **ends(2), **refused}),
            **_on(3, ends(3)), **_on(1, ends(1)),
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def alike(answers: list[Any]) -> dict[str, Any]:
    """What all ranks say."""
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert len({(answer["weights_sha256"], answer["state"], answer["steps"]) for answer in answers}) == 1
    return answers[0]


@shares_the_ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SETUPS)
def test_all_processes_stop_at_the_step_of_one_processs_signal(moved: dict[str, Any], name: str) -> None:
    status = alike(moved[name])
    assert (status["state"], status["steps"], status["signal"]) == ("interrupted", 6, signal.SIGTERM)


@shares_the_ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("new", SETUPS)
@pytest.mark.parametrize("old", SETUPS)
def test_any_ranks_go_on_from_any_ranks_checkpoint(moved: dict[str, Any], old: str, new: str) -> None:
    there, straight, alone = (alike(moved[n]) for n in (f"{old} > {new}", f"straight {new}", "straight alone"))
    assert there["state"] == "finished" and there["steps"] == 12
    if old == new:
        assert there["weights_sha256"] == straight["weights_sha256"]
        assert there["records"] == straight["records"]
    for several in (there, straight):
        for a, b in zip(several["records"], alone["records"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)  # fp32 sums in another order, over 12 steps


@shares_the_ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_refused(moved: dict[str, Any], name: str) -> None:
    assert all(REFUSED[name][2] in answer for answer in moved[name]), moved[name]


def test_what_this_process_cannot_do_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"parallel='fsdp2' needs a process group; start with torchrun"):
        train(config, tmp_path, Options(parallel="fsdp2"))
    with pytest.raises(ValueError, match=r"device='cuda', but torch sees no GPU"):
        train(config, tmp_path, Options(device="cuda"))
