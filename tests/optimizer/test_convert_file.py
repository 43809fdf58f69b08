"""``python -m optimizer convert``: files in, files out, and the training that goes on from them."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optimizer import AdamMini
from optimizer.__main__ import main
from optimizer.tools.convert.file import convert_file, converted
from tests.optimizer.models import GPT, Llama, train
from tests.optimizer.states import equal, trained

KEPT = Path(__file__).with_name("checkpoints")


def llama() -> nn.Module:
    """What the command line names; small as the kept checkpoints' model."""
    return Llama(vocab=7, dim=8, layers=1, n_heads=2, n_kv_heads=2, hidden=12)


def usual() -> nn.Module:
    return GPT()


def no_decay(model: nn.Module, decays: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0}]  # fmt: skip


GROUPINGS = {
    "one": lambda m: list(m.parameters()),
    "named": lambda m: list(reversed(list(m.named_parameters()))),
    "nanoGPT": lambda m: no_decay(m, lambda n, p: p.dim() >= 2),
    "transformers": lambda m: no_decay(m, lambda n, p: "ln_" not in n and not n.endswith("bias")),
    "norms first": lambda m: no_decay(m, lambda n, p: p.dim() >= 2)[::-1],
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_file_of_adamw(grouping: str, inside: bool, tmp_path: Path, capsys) -> None:
    """By its command line; what it writes is what loading with convert=True gives."""
    model = GPT()
    adamw = torch.optim.AdamW(GROUPINGS[grouping](model), lr=1e-2)
    train(model, adamw)
    whole = {"model": model.state_dict(), "epoch": 3, "optimizers": [adamw.state_dict()]}
    torch.save(whole if inside else adamw.state_dict(), tmp_path / "in.pt")
    main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"),
          "--model", "tests.optimizer.test_convert_file:usual"])  # fmt: skip
    assert "state of 'adam'" in capsys.readouterr().out
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    if inside:
        assert equal({**made, "optimizers": None}, {**whole, "optimizers": None})
        made = made["optimizers"][0]
    assert {group["rules"] for group in made["param_groups"]} == {"adam_mini"}
    assert [len(group["params"]) for group in made["param_groups"]] == [len(g["params"]) for g in adamw.param_groups]
    ours, direct = AdamMini(model), AdamMini(model)
    ours.load_state_dict(made)
    names = {p: name for name, p in model.named_parameters()}
    document = adamw.state_dict()
    for group, live in zip(document["param_groups"], adamw.param_groups, strict=True):
        group["param_names"] = [names[p] for p in live["params"]]
    direct.load_state_dict(document, convert=True)
    assert equal(ours.state_dict(), direct.state_dict())
    train(model, ours)


@pytest.mark.parametrize("version", ["1.0.0", "1.0.5"])
def test_a_file_of_the_published_package(version: str, tmp_path: Path) -> None:
    """Groups of one tensor become two; the same as loading it with convert=True."""
    out = tmp_path / "out.pt"
    report = convert_file(KEPT / f"adam_mini_{version}.pt", out, llama())
    assert (report.kind, report.parameters, report.without) == ("adam-mini", 12, ())
    made, kept = (torch.load(f, weights_only=True)["optimizer"] for f in (out, KEPT / f"adam_mini_{version}.pt"))
    assert [group["weight_decay"] for group in made["param_groups"]] == [0.1, 0.0]
    ours, direct = AdamMini(llama()), AdamMini(llama())
    ours.load_state_dict(made)
    direct.load_state_dict(kept, convert=True)
    assert equal(ours.state_dict(), direct.state_dict())


def test_our_own_files_change_their_rules_in_place(tmp_path: Path) -> None:
    """IN may be OUT; blocks that are the same keep their bits."""
    model, opt = trained(rules="adam_mini")
    file = tmp_path / "state.pt"
    torch.save(opt.state_dict(), file)
    report = convert_file(file, file, Llama(), "short_run", kind="ours")
    assert report.rebuilt == 2, "the value matrices of two layers"
    again = AdamMini(model, rules="short_run")
    again.load_state_dict(torch.load(file, weights_only=True))
    for p, state in opt.state.items():
        same = equal(state, again.state[p])
        assert same == (p not in {layer.attention.wv.weight for layer in model.layers})


def test_a_converted_document_holds_the_first_moments_it_was_given() -> None:
    """What bounds the memory: only second moments are new."""
    model = Llama()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, adamw)
    made, _ = converted(adamw.state_dict(), Llama())
    moments = [adamw.state[p]["exp_avg"] for p in model.parameters()]
    assert [made["state"][i]["exp_avg"].data_ptr() for i in range(len(moments))] == [m.data_ptr() for m in moments]


def broken(tmp_path: Path, what: str) -> Path:
    file = tmp_path / "in.pt"
    model = GPT()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw)
    state = adamw.state_dict()
    if what == "no state":
        torch.save(model.state_dict(), file)
    elif what == "two states":
        torch.save({"a": state, "b": state}, file)
    elif what == "old format":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif what == "objects":
        torch.save({"model": model, "optimizer": state}, file)
    elif what == "no names":
        state["param_groups"] = [{**state["param_groups"][0], "params": [i]} for i in state["state"]]
        torch.save(state, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("no state", [], "holds 0 optimizer states: no dictionary has state and param_groups"),
        ("two states", [], r"holds 2 optimizer states \(a, b\); choose one with --key"),
        ("two states", ["--key", "c"], r"--key 'c' is no optimizer state .*found \['a', 'b'\]"),
        ("old format", [], "cannot be mapped"), ("objects", [], "cannot be mapped.*plain tensors"),
        ("no names", [], "no parameter names, and none of the usual ways"),
        ("fine", ["--from", "adam-mini"], "--from adam-mini, but the file contains a state of 'adam'"),
        ("fine", ["--model", "tests.optimizer.test_convert_file:llama"], "none of the usual ways"),
        ("fine", ["--rules", "no_such"], "no_such"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_leaves_no_file(tmp_path: Path, what: str, options: list[str], words: str) -> None:
    file = broken(tmp_path, what)
    arguments = ["convert", str(file), str(tmp_path / "out.pt"), "--model", "tests.optimizer.test_convert_file:usual"]
    with pytest.raises(SystemExit, match=words):
        main([*arguments, *options])
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Files may not grow beyond 4 KiB: writing ends in the middle."""
    file, out = broken(tmp_path, "fine"), tmp_path / "out.pt"
    out.write_bytes(b"before")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            convert_file(file, out, GPT())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [file, out]


def test_one_of_two_states_by_its_key(tmp_path: Path) -> None:
    file = broken(tmp_path, "two states")
    convert_file(file, tmp_path / "out.pt", GPT(), key="b")
    before, after = (torch.load(f, weights_only=True) for f in (file, tmp_path / "out.pt"))
    assert equal(before["a"], after["a"]) and "rules" in after["b"]["param_groups"][0]


def test_frozen_and_unknown_parameters(tmp_path: Path) -> None:
    """A file of some parameters says so; one of unknown names is refused."""
    model = GPT()
    adamw = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if "wpe" not in n])
    train(model, adamw)
    document = adamw.state_dict()
    assert converted(document, GPT())[1].without == ("transformer.wpe.weight",)
    with pytest.raises(ValueError, match=r"has no parameter transformer\.wte\.weight, .*of the file's"):
        converted(document, llama())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_is_named(tmp_path: Path, kept: float) -> None:
    """Cut in the middle, all that the system said was "[Errno 22] Invalid argument"."""
    file = broken(tmp_path, "fine")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(SystemExit, match=r"in\.pt.*(damaged or cut|cannot be mapped)"):
        main(["convert", str(file), str(tmp_path / "out.pt"), "--model", "tests.optimizer.test_convert_file:usual"])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-2000]), r"__0_0\.distcp' is cut: \d+ bytes, at least \d+ are needed"),
        (lambda p: p.write_bytes(b""), r"__0_0\.distcp' is cut: 0 bytes"),
        (Path.unlink, r"__0_0\.distcp' is missing, though \.metadata names it"),
        (lambda p: p.write_bytes(bytes(p.stat().st_size)), r"folder' cannot be read .*use an earlier checkpoint"),
        (lambda p: p.with_name(".metadata").write_bytes(b"x"), r"folder' has a \.metadata that cannot be read"),
        (lambda p: p.with_name(".metadata").unlink(), r"folder' is a folder without \.metadata"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(tmp_path: Path, damage: Any, words: str) -> None:
    """torch's own error for these is no Exception, so it went past every handler as a traceback."""
    model = GPT()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw)
    folder = tmp_path / "folder"
    dcp.save({"optimizer": get_optimizer_state_dict(model, adamw)}, checkpoint_id=folder, no_dist=True)
    damage(folder / "__0_0.distcp")
    with pytest.raises(ValueError, match=words):
        convert_file(folder, tmp_path / "out.pt", GPT())
    assert list(tmp_path.iterdir()) == [folder]
