"""LLaMA-Factory 0.9.5 with ``use_adam_mini: true`` and this project's adam_mini, in an environment of its own."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import Record
from tests.interop.launch import ROOT, output, started
from tests.interop.plain import SAME, falls

HOME = Path(os.environ.get("LLAMAFACTORY_VENV", ROOT / ".venv/llamafactory"))
PYTHON = str(HOME / "bin/python")
OURS = "adam_mini.Adam_mini"
DOOR = "LLaMA-Factory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model and the demo data of the sdist are."""
    made = tmp_path_factory.mktemp("llamafactory")
    output([PYTHON, "examples/llamafactory/tiny.py", str(made / "tiny")])
    with tarfile.open(HOME / "llamafactory-0.9.5.tar.gz") as sdist:
        for name in ("dataset_info.json", "identity.json", "alpaca_en_demo.json"):
            inside = sdist.extractfile(f"llamafactory-0.9.5/data/{name}")
            assert inside is not None
            (made / name).write_bytes(inside.read())
    return made


def within(what: str, folder: Path) -> Any:
    """Run a part of tests/interop/llamafactory.py with LLaMA-Factory's Python."""
    return started([PYTHON, "-m", "tests.interop.llamafactory", what, str(folder), str(folder)])


def versions() -> str:
    """Of what that environment has."""
    names = ("llamafactory", "transformers", "torch")
    asked = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    found = output([PYTHON, "-c", asked]).split()
    return ", ".join(f"{name} {number.split('+')[0]}" for name, number in zip(names, found, strict=True))


def check_factory(record: Record, folder: Path) -> None:
    """Its own function makes our class, whatever a configuration says of dim and heads."""
    left = within("factory", folder)
    assert Path(left.pop("file")) == ROOT / "adam_mini.py"
    worst = max(one["difference"] for one in left.values())
    record(
        DOOR, "create_custom_optimizer", versions(), ran="Llama, GPT-2, Gemma 3 (nested configuration), 5 steps each",
        result=f"Adam_mini is ours, blocks are the model's; weights within {worst:.1e} of AdamMini(model)",
    )  # fmt: skip
    assert {one["class"] for one in left.values()} == {OURS}
    assert all(one["same blocks"] for one in left.values())
    assert [one["told"] for one in left.values()] == [[32, 4, 2], [32, 4, None], [None, None, None]]
    assert worst <= SAME


def check_training(record: Record, folder: Path) -> None:
    """Supervised fine-tuning by its ``run_exp``, step by step against a plain AdamMini with the same gradients."""
    left = within("train", folder)
    record(
        DOOR, "use_adam_mini: true", versions(), ran="run_exp: examples/llamafactory/sft.yaml, tiny Llama, 20 steps",
        result=f"{falls(left['losses'])}; weights within {left['difference']:.1e} of a plain AdamMini",
    )  # fmt: skip
    assert left["class"] == [OURS] and Path(left["file"]) == ROOT / "adam_mini.py"
    assert len(left["losses"]) == 20 and left["difference"] <= SAME


@pytest.mark.parametrize("ranks", [1, 2])
def check_command_line(record: Record, folder: Path, ranks: int) -> None:
    """llamafactory-cli as a user runs it; the state it saves is ours."""
    saved = folder / f"saved-{ranks}"
    command = [str(HOME / "bin/llamafactory-cli"), "train", "examples/llamafactory/sft.yaml"]
    paths = {"model_name_or_path": folder / "tiny", "dataset_dir": folder, "output_dir": saved}
    many = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
    output(
        [*command, *(f"{key}={value}" for key, value in paths.items()), *(["ddp_backend=gloo"] if many else [])],
        PATH=f"{HOME / 'bin'}:{os.environ['PATH']}", MASTER_ADDR="127.0.0.1", **many,
    )  # fmt: skip
    lines = [json.loads(line) for line in (saved / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    state = torch.load(saved / "checkpoint-20/optimizer.pt", weights_only=True)
    kept = {key for one in state["state"].values() for key in one}
    record(
        DOOR, "llamafactory-cli train", versions(), ranks=ranks,
        ran="examples/llamafactory/sft.yaml: full fine-tuning of a tiny Llama on its demo data, 20 clipped steps",
        result=f"{falls(losses)}; saves {', '.join(sorted(kept))}",
    )  # fmt: skip
    assert len(losses) == 20
    assert kept == {"step", "exp_avg", "exp_avg_sq"} and {g["rules"] for g in state["param_groups"]} == {"adam_mini"}
