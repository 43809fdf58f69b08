"""The table: its numbers against the optimizer's own state, its rows against the names they stand for, its shell."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizer import AdamMini, Rules, Unit, explain, partition
from optimizer.__main__ import main
from optimizer.tools.explain.collapse import collapse_names
from optimizer.tools.explain.rows import compare, explanation
from tests.optimizer.models import GPT, Llama


def expand(name: str) -> list[str]:
    """Every name that a collapsed one stands for, written independently of the code under test."""
    pieces = re.split(r"\{([^}]*)\}", name)
    choices: list[list[str]] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            choices.append([piece])
            continue
        ends = [part.split("..") for part in piece.split(",")]
        choices.append([str(n) for end in ends for n in range(int(end[0]), int(end[-1]) + 1)])
    return ["".join(parts) for parts in itertools.product(*choices)]


def test_bytes_are_the_optimizer_s_own() -> None:
    for model in (Llama(), GPT().bfloat16(), Llama().double()):
        for rules in ("adam_mini", "slim_adam", "elementwise"):
            sums, held = explanation(model, rules).totals, AdamMini(model, rules=rules).state_bytes()
            assert (sums.exp_avg_bytes, sums.exp_avg_sq_bytes) == (held["exp_avg"], held["exp_avg_sq"])
            assert sums.blocks == sum(layout.n_blocks for layout in partition(model, rules).values())
            size = next(model.parameters()).element_size()
            assert sums.adamw_bytes == 2 * size * sum(p.numel() for p in model.parameters())
            collapsed = explanation(model, rules).collapsed()
            assert collapsed.totals == sums and len(collapsed.rows) <= sums.parameters


def test_frozen_parameters_have_rows_but_no_state() -> None:
    model = Llama()
    model.tok_embeddings.requires_grad_(False)
    found = explanation(model)
    assert [row.state_bytes + row.adamw_bytes for row in found.rows if row.name == "tok_embeddings.weight"] == [0]
    sums = found.totals
    assert sums.exp_avg_bytes == AdamMini(model).state_bytes()["exp_avg"]
    assert (sums.frozen, sums.frozen_elements) == (1, 11 * 16)
    text = explain(model)
    assert re.search(r"tok_embeddings\.weight .* frozen ", text) and "1 frozen parameters, 176 elements" in text


def test_like_layers_are_one_row_and_odd_ones_their_own() -> None:
    model = Llama(layers=5)
    model.layers[2].feed_forward.w1 = nn.Linear(16, 30, bias=False)
    model.layers[3].attention.wq.weight.requires_grad_(False)
    rows = {row.name: row.count for row in explanation(model).collapsed().rows}
    assert rows["layers.{0..4}.attention.wk.weight"] == 5
    assert rows["layers.{0..1,3..4}.feed_forward.w1.weight"] == 4 and rows["layers.2.feed_forward.w1.weight"] == 1
    assert rows["layers.{0..2,4}.attention.wq.weight"] == 4 and rows["layers.3.attention.wq.weight"] == 1
    assert "layers.{0..4}.feed_forward.w3.weight" in rows, "w1 and w3 are names, not layers"
    assert sorted(n for name in rows for n in expand(name)) == sorted(name for name, _ in model.named_parameters())
    line = next(x for x in explain(model).splitlines() if x.startswith("layers.{0..4}.attention.wk.weight"))
    assert " ".join(line.split()[1:]) == (
        "5 16x16 KEY ATTENTION_HEAD 4 1,024 64 20 5,440 yes Meta and torchtitan Llama: rows are (head, head_dim)"
    )
    full = explain(model, collapse=False)
    assert "{" not in full and all(name in full for name, _ in model.named_parameters())


class Bare(nn.Module):
    """A layer whose reasons quote its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(3))
        self.mixing = nn.Parameter(torch.zeros(4, 6))


def test_reasons_that_quote_the_name_do_not_keep_layers_apart() -> None:
    model = nn.ModuleDict({"known": nn.Linear(2, 2), "odd": nn.ModuleList(Bare() for _ in range(3))})
    lines = explain(model).splitlines()
    assert lines[2].startswith("! odd.{0..2}.mixing  "), "the unrecognised first"
    assert not any(line.startswith("!") for line in lines[3:-1]) and lines[-1].startswith("! 3 weight(s)")
    assert sum(line.startswith("odd.{0..2}.norm ") for line in lines) == 1
    assert any(line.endswith("by name 'odd.{0..2}.norm'") for line in lines)


@given(
    st.sets(st.tuples(st.integers(0, 6), st.sampled_from("ab"), st.integers(0, 12)), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_collapsing_loses_and_invents_no_name(keys: set[tuple[int, str, int]], kinds: int) -> None:
    ordered = sorted(keys)
    names = [f"layers.{i}.{word}.{j}.w1" for i, word, j in ordered]
    likeness = [(i * j) % kinds for i, _, j in ordered]
    groups = collapse_names(names, likeness)
    assert sorted(position for _, members in groups for position in members) == list(range(len(names)))
    for name, members in groups:
        assert sorted(expand(name)) == sorted(names[m] for m in members)
        assert len({likeness[m] for m in members}) == 1


def test_a_diff_shows_what_differs_and_nothing_else() -> None:
    model = Llama()
    found = compare(model, "adam_mini", "short_run")
    assert [change.left.name for change in found.changes] == [f"layers.{i}.attention.wv.weight" for i in (0, 1)]
    (change,) = found.collapsed().changes
    assert (change.left.name, change.left.count) == ("layers.{0..1}.attention.wv.weight", 2)
    assert (change.left.n_blocks, change.right.n_blocks, change.bytes_change) == (16, 1, 0)
    finer = Rules("adam_mini").override({"output.weight": Unit.ELEMENT})
    (change,) = compare(model, "adam_mini", finer).changes
    assert change.bytes_change == 4 * (11 * 16 - 11)
    assert not compare(model, "adam_mini", Rules("adam_mini")).changes


# --- from a shell ----------------------------------------------------------------------------------------------


def test_json_has_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "tests.optimizer.models:Llama", "--json", "--rules", "slim_adam"])
    document = json.loads(capsys.readouterr().out)
    model = Llama()
    assert [entry["name"] for entry in document["parameters"]] == [name for name, _ in model.named_parameters()]
    assert document["rules"]["name"] == "slim_adam"
    assert document["totals"]["exp_avg_sq_bytes"] == AdamMini(model, rules="slim_adam").state_bytes()["exp_avg_sq"]
    query = next(entry for entry in document["parameters"] if entry["name"] == "layers.1.attention.wq.weight")
    assert query["roles"] == ["QUERY"] and query["units"] == ["OUT_NEURON"] and query["blocks"] == 16


def test_the_diff_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(Rules("adam_mini").override({"*.wv.weight": Unit.TENSOR}).save(tmp_path / "mine.json"))
    main(["explain", "tests.optimizer.models:Llama", "--diff", "adam_mini", path])
    text = capsys.readouterr().out
    assert "layers.{0..1}.attention.wv.weight" in text and "wq" not in text
    assert "2 parameters differ: 32 -> 2 scalars, +0 bytes" in text
    main(["explain", "tests.optimizer.models:Llama", "--diff", "adam_mini", path, "--no-collapse"])
    assert "layers.1.attention.wv.weight" in capsys.readouterr().out
    main(["explain", "tests.optimizer.models:Llama", "--diff", "adam_mini", path, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["differences"] == [
        {"kind": "override", "key": "*.wv.weight", "left": None, "right": "TENSOR"}
    ]  # fmt: skip
    assert [entry["right"]["blocks"] for entry in document["parameters"]] == [1, 1]
    main(["explain", "tests.optimizer.models:Llama", "--diff", "short_run", path])
    assert "no parameter's layout differs" in capsys.readouterr().out


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 40, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 32,
    "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def test_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from optimizer.wrappers.transformers import model_from_config

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = model_from_config(tmp_path)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in model.parameters())
    for target in (tmp_path, tmp_path / "config.json"):
        main(["explain", str(target), "--json"])
        rows = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["parameters"]}
        query, key = (rows[f"model.layers.2.self_attn.{letter}_proj.weight"] for letter in "qk")
        assert (query["blocks"], key["blocks"], query["dtype"]) == (5, 1, "bfloat16")
        assert query["exp_avg_bytes"] == 2 * 30 * 40 and query["adamw_bytes"] == 4 * 30 * 40
    (tmp_path / "no_class.json").write_text(json.dumps({**CONFIG, "architectures": ["Unheard"]}))
    assert type(model_from_config(tmp_path / "no_class.json")) is type(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], r"'nonsense'.*module:attribute.*config\.json"),
        (["json:nope"], r"'json:nope'.*no attribute"),
        (["json:loads"], r"'json:loads'.*without arguments"),
        (["json:__name__"], r"is a str"),
        (["tests.optimizer.models:Llama", "--rules", "adam_minni"], r"'adam_minni'.*shipped"),
        (["tests.optimizer.models:Llama", "--diff", "adam_mini", "nix"], r"'nix'"),
        (["tests.optimizer.models:Llama", "--diff", "adam_mini", "slim_adam", "--rules", "x"], r"'x'.*leave one out"),
        (["DIR"], r"config\.json does not exist"),
        (["DIR/missing.json"], r"missing\.json does not exist"),
        (["DIR/untyped.json"], r"untyped\.json: model_type=None"),
        (["DIR/torn.json"], r"torn\.json is not valid JSON"),
        (["DIR/unknown.json"], r"model_type='lama'.*module:attribute"),
        (["DIR/wrong.json"], r"wrong\.json.*(?s:.*)num_attention_heads"),
    ],
)
def test_what_cannot_be_explained_is_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "untyped.json").write_text('{"hidden_size": 4}')
    (tmp_path / "torn.json").write_text('{"hidden')
    (tmp_path / "unknown.json").write_text('{"model_type": "lama"}')
    (tmp_path / "wrong.json").write_text(json.dumps({**CONFIG, "num_attention_heads": "five"}))
    with pytest.raises(SystemExit, match=words):
        main(["explain", arguments[0].replace("DIR", str(tmp_path)), *arguments[1:]])


def in_a_terminal(width: int, *arguments: str, without_rich: bool = False) -> list[str]:
    """Lines of the command's output in a pseudo-terminal of that width, without colours."""
    import pty

    code = "import sys\n" + without_rich * "sys.modules.update({'rich': None, 'rich.console': None})\n"
    code += "from optimizer.__main__ import main; main(sys.argv[1:])"
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=child, env=environment)
    os.close(child)
    text = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait(timeout=60) == 0
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()


def test_the_terminal_s_table_fits_and_keeps_the_names() -> None:
    target = "tests.optimizer.models:GPT"
    narrow, wide = (in_a_terminal(width, "explain", target) for width in (90, 220))
    assert max(map(len, narrow)) <= 90 < max(map(len, wide))
    for lines in (narrow, wide):
        assert any("transformer.h.0.attn.c_attn.weight" in line for line in lines)
    assert any("[Q|K|V]" in line for line in wide), "no markup"
    assert any(line.startswith("left out to fit the width: m bytes") for line in narrow)
    assert not any("left out" in line for line in wide)


def test_without_rich_a_terminal_gets_the_plain_text() -> None:
    lines = in_a_terminal(90, "explain", "tests.optimizer.models:GPT", without_rich=True)
    assert lines == explain(GPT()).splitlines()
