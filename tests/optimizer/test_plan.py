"""The memory planner against bytes that exist: states of real optimizers, FSDP2's own shards, measured temporaries.

A planner that only agrees with its own formulas proves nothing, so wherever torch can be asked, it is; where it cannot
(published sizes, torchao's storage) the expected numbers are worked out here by hand. Ranks that hold shards are in
``test_plan_shards.py``, quantised moments in ``test_plan_formats.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer import AdamMini, Rules
from optimizer.__main__ import main
from optimizer.partition import discover, layout_of
from optimizer.tools.architectures import facts, shipped
from optimizer.tools.plan import Plan, Setup, make_plan, parameters_of
from optimizer.tools.plan.activations import estimate
from optimizer.tools.plan.memory import DEFAULT_RULES
from optimizer.tools.plan.sharding import tensor_parallel_shape
from optimizer.tools.plan.states import torchao_moment
from optimizer.tools.plan.table import first_row
from optimizer.tools.targets import load_target

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "vocab_size": 101, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    import transformers

    keys = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**keys, **changes})).to(dtype)


def made() -> nn.Module:
    """A target of its own: python -m optimizer plan tests.optimizer.test_plan:made."""
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))


def with_gradients(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad else None
    return model


def nbytes(tensors: Iterator[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_of(optimizer: torch.optim.Optimizer, kind: str) -> int:
    names = (kind, "exp_avg_sq_col") if kind == "exp_avg_sq" else (kind,)
    return nbytes(state[name] for state in optimizer.state.values() for name in names if name in state)


# --- one device: real optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_are_those_of_real_optimizers_after_a_step(dtype: str) -> None:
    model = with_gradients(llama({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]))
    model.model.embed_tokens.weight.requires_grad_(False)  # frozen: it has weights, but neither gradient nor state
    model.model.embed_tokens.weight.grad = None
    plan = make_plan(parameters_of(model), Setup(dtype=dtype), (*DEFAULT_RULES, "elementwise"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for rules in (*DEFAULT_RULES, "elementwise"):
        optimizer, row = AdamMini(model, lr=0.0, rules=rules), plan.row(f"Adam-mini, {rules}")
        optimizer.step()
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert getattr(row.state, kind) == state_of(optimizer, kind) == optimizer.state_bytes()[kind], (rules, kind)
        assert row.state.scales == 0
        layouts = {name: layout_of(a, Rules(rules)) for name, a in discover(model).items()}
        assert row.n_blocks == sum(layouts[n].n_blocks for n, p in model.named_parameters() if p.requires_grad)
        assert row.parameters == nbytes(iter(model.parameters()))
        assert row.gradients == nbytes(iter(trainable))
        assert row.resident == row.parameters + row.gradients + sum(optimizer.state_bytes().values())
    adamw = torch.optim.AdamW(trainable, lr=0.0)
    adamw.step()
    row = plan.rows[0]
    assert row.optimizer == f"AdamW, {dtype} states"
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        assert getattr(row.state, kind) == state_of(adamw, kind)


def measured(call: Callable[[], Any]) -> int:
    """The most that is allocated at one time during a call, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    current = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            top = max(top, current)
    return top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", ["adam_mini", "slim_adam", "pytorch_default", "elementwise"])
def test_temporaries_are_bounded_by_the_plan_and_not_by_much(dtype: torch.dtype, rules: str) -> None:
    linear = with_gradients(nn.Sequential(nn.Linear(600, 1000, bias=False, dtype=dtype)))
    optimizer = AdamMini(linear, rules=rules, fused=False)  # the native step has none to plan for
    optimizer.step()
    top = measured(optimizer.step)
    setup = Setup(dtype="fp32" if dtype is torch.float32 else "bf16")
    planned = make_plan(parameters_of(linear), setup, (rules,)).rows[-1].state.temporary
    assert top <= planned + 64  # a few scalars
    assert planned <= 2.1 * top


def test_the_temporary_of_adamw_is_that_of_the_foreach_step() -> None:
    model = with_gradients(llama())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    optimizer.step()
    planned = make_plan(parameters_of(model), Setup(dtype="fp32"), ()).rows[0].state.temporary
    top = measured(optimizer.step)
    assert planned <= top <= 1.02 * planned


def test_eight_bit_states_are_stored_as_torchao_does() -> None:
    assert torchao_moment(4096, 2, flat=False) == (4096, 4096 // 256 * 4 + 1024)
    assert torchao_moment(4095, 2, flat=False) == (8190, 0)  # too small
    assert torchao_moment(4097, 4, flat=False) == (16388, 0)  # no whole blocks
    assert torchao_moment(4097, 4, flat=True) == (4097, 17 * 4 + 1024)
    parameters = parameters_of(nn.Linear(64, 128))
    row = make_plan(parameters, Setup(dtype="bf16"), ()).row("AdamW, 8-bit states")
    assert row.state.exp_avg == row.state.exp_avg_sq == 64 * 128 + 2 * 128  # the bias stays in bf16
    assert row.state.scales == 2 * (32 * 4 + 1024)


def test_a_master_copy_makes_the_states_fp32() -> None:
    parameters = parameters_of(llama())
    plain, with_master = (make_plan(parameters, Setup(dtype="bf16", master=m)) for m in (False, True))
    elements = plain.elements
    assert (plain.rows[3].master, with_master.rows[3].master) == (0, 4 * elements)
    assert with_master.row("AdamW, fp32 states").state.exp_avg == with_master.rows[3].state.exp_avg == 4 * elements
    assert with_master.rows[3].parameters == plain.rows[3].parameters == 2 * elements


# --- many devices -------------------------------------------------------------------------------------------------


def test_what_each_stage_divides() -> None:
    parameters = parameters_of(llama())
    rows = {s: make_plan(parameters, Setup(world=4, sharding=s)).rows[0] for s in ("ddp", "zero1", "zero2", "zero3")}
    divided = {s: [bool(row.parameters < rows["ddp"].parameters), bool(row.gradients < rows["ddp"].gradients),
                   bool(row.state.total < rows["ddp"].state.total)] for s, row in rows.items()}  # fmt: skip
    assert divided == {"ddp": [False] * 3, "zero1": [False, False, True], "zero2": [False, True, True],
                       "zero3": [True] * 3}  # fmt: skip
    assert make_plan(parameters, Setup(world=1, sharding="zero3")).rows[0].resident == rows["ddp"].resident


def test_tensor_parallel_shapes_by_role() -> None:
    parameters = {p.name: p for p in parameters_of(llama(vocab_size=102))}
    shape = {name: tensor_parallel_shape(p, 2) for name, p in parameters.items()}
    layer = "model.layers.0."
    assert shape["model.embed_tokens.weight"] == shape["lm_head.weight"] == (51, 24)
    assert shape[layer + "self_attn.q_proj.weight"] == (24, 24)  # 3 of 6 heads of 8
    assert shape[layer + "self_attn.k_proj.weight"] == shape[layer + "self_attn.v_proj.weight"] == (8, 24)
    assert shape[layer + "self_attn.o_proj.weight"] == (24, 24)  # of (24, 48)
    assert shape[layer + "mlp.gate_proj.weight"] == (28, 24)
    assert shape[layer + "mlp.down_proj.weight"] == (24, 28)
    assert shape[layer + "input_layernorm.weight"] == (24,)


def test_tensor_parallel_cuts_conv1d_along_its_outputs() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=10, n_positions=8, n_embd=12, n_layer=1, n_head=4)
    parameters = {p.name: p for p in parameters_of(transformers.GPT2LMHeadModel(config))}
    shape = {name.split("h.0.")[-1]: tensor_parallel_shape(p, 2) for name, p in parameters.items()}
    assert shape["attn.c_attn.weight"] == (12, 18) and shape["attn.c_proj.weight"] == (6, 12)
    assert shape["mlp.c_fc.weight"] == (12, 24) and shape["mlp.c_proj.weight"] == (24, 12)
    assert shape["transformer.wpe.weight"] == (8, 12) and shape["attn.c_attn.bias"] == (36,)


@pytest.mark.parametrize(("tp", "count"), [(2, "101"), (3, "101"), (4, "101")])
def test_tensor_parallel_refuses_what_it_does_not_divide(tp: int, count: str) -> None:
    with pytest.raises(ValueError, match=rf"--tp {tp} does not divide the {count} TOKEN_EMBEDDING.*embed_tokens"):
        make_plan(parameters_of(llama()), Setup(world=tp, tp=tp))


def test_tensor_parallel_refuses_to_cut_a_head() -> None:
    """16 key rows divide by 4, their 2 heads do not."""
    with pytest.raises(ValueError, match=r"--tp 4 does not divide the 2 KEY heads of .*k_proj"):
        make_plan(parameters_of(llama(vocab_size=100, num_attention_heads=8)), Setup(world=4, tp=4))


def test_fsdp_over_tensor_parallel_shards() -> None:
    """8 ranks, 2 of them share a matrix: a linear layer of 10 x 6 leaves 5 rows, of which rank 0 has ceil(5/4)."""
    mlp = {name: nn.Linear(6, 10, bias=False) for name in ("up_proj", "gate_proj")}
    model = nn.ModuleDict({"mlp": nn.ModuleDict({**mlp, "down_proj": nn.Linear(10, 6, bias=False)})})
    row = make_plan(parameters_of(model), Setup(world=8, tp=2, sharding="fsdp", dtype="fp32")).rows[3]
    assert row.parameters == 4 * (2 * 2 * 6 + 2 * 5)
    assert row.state.exp_avg_sq == 4 * (2 + 2 + 2)


# --- published architectures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    names = ("gpt2-125m", "gpt2-355m", "llama-2-7b", "llama-3-8b")
    return {name: make_plan(parameters_of(load_target(name)), Setup(dtype="fp32")) for name in names}


def test_the_committed_table_is_what_the_command_computes(plans: dict[str, Plan]) -> None:
    lines = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()
    for name, plan in plans.items():
        assert "| " + " | ".join(first_row(name, plan)) + " |" in lines
    titles = [facts(name)["title"] for name in shipped()]
    assert all(sum(line.startswith(f"| {title} |") for line in lines) == 3 for title in titles)


def test_published_sizes_and_scalars_by_hand(plans: dict[str, Plan]) -> None:
    assert plans["gpt2-125m"].elements == 124_439_808
    assert plans["gpt2-355m"].elements == 354_823_168
    vocab, dim, hidden, layers, heads = 32000, 4096, 11008, 32, 32
    llama2 = plans["llama-2-7b"]
    assert llama2.elements == 2 * vocab * dim + layers * (4 * dim * dim + 3 * dim * hidden + 2 * dim) + dim
    scalars = 2 * vocab + layers * (2 * heads + 2 * dim + 2 * hidden + dim + 2) + 1
    assert llama2.row("Adam-mini, adam_mini").n_blocks == scalars
    assert plans["llama-3-8b"].elements == 8_030_261_248


def test_the_papers_memory_table(plans: dict[str, Plan]) -> None:
    """8 and 4 bytes per parameter; v as stored costs Adam-mini less than one part in a thousand more."""
    for name in ("llama-2-7b", "llama-3-8b"):
        plan = plans[name]
        for key, optimizer in (("adamw", "AdamW, fp32 states"), ("adam_mini", "Adam-mini, adam_mini")):
            state = plan.row(optimizer).state
            assert (state.exp_avg + state.exp_avg_sq) / 1e9 == pytest.approx(facts(name)["paper_gb"][key], rel=1e-3)


def test_405_billion_parameters_need_no_memory() -> None:
    # The process's own peak. getrusage() would report the peak of the process that started it if that was larger.
    code = (
        "import sys; from optimizer.__main__ import main; "
        "main(['plan', 'llama-3-405b', '--world', '1024', '--tp', '8', '--fsdp', '--json']); "
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM:')); "
        "print(peak.split()[1], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["elements"] == 405_853_388_800 and not document["unrecognised"]
    assert int(result.stderr.split()[-1]) * 1024 < 1 << 30


# --- activations --------------------------------------------------------------------------------------------------


class Sizes:
    """GPT-3: 96 heads, hidden size 12288."""

    hidden_size, num_attention_heads, num_hidden_layers = 12288, 96, 96


def test_activations_follow_the_published_formula() -> None:
    """At s = 2048 GPT-3's attention term, 5as/h, is 80 beside the layer's 34 (arXiv 2205.05198, section 4.2)."""
    found = estimate(Sizes, batch=2, seq=2048)
    assert found.selective == 96 * 34 * 2048 * 2 * 12288
    assert found.stored / found.selective == pytest.approx((34 + 80) / 34)
    shared = estimate(Sizes, batch=2, seq=2048, tp=8)
    assert shared.selective == 96 * 13 * 2048 * 2 * 12288
    with pytest.raises(ValueError, match="--seq 0"):
        estimate(Sizes, batch=1, seq=0)
    with pytest.raises(ValueError, match=r"--batch 1: .*leave out"):
        estimate(None, batch=1, seq=1)


# --- the command --------------------------------------------------------------------------------------------------


def config_file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    return str(path)


def test_a_configuration_its_folder_and_the_model_itself_agree(tmp_path: Path) -> None:
    model = llama()
    for target in (config_file(tmp_path, architectures=["LlamaForCausalLM"]), str(tmp_path)):
        loaded = load_target(target)
        assert all(p.is_meta for p in loaded.parameters())
        assert parameters_of(loaded) == parameters_of(model)
    classifier = load_target(config_file(tmp_path, architectures=["LlamaForSequenceClassification"]))
    assert type(classifier).__name__ == "LlamaForSequenceClassification"
    encoder = {"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(encoder))
    assert type(load_target(str(tmp_path))).__name__ == "T5ForConditionalGeneration"


def test_the_table_and_the_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = config_file(tmp_path, vocab_size=102)
    command = ["plan", target, "--world", "4", "--tp", "2", "--zero", "2", "--rules", "adam_mini,derived", "--master"]
    main([*command, "--json", "--batch", "2", "--seq", "16"])
    document = json.loads(capsys.readouterr().out)
    names = [row["optimizer"] for row in document["rows"]]
    assert names == ["AdamW, fp32 states", "AdamW, 8-bit states", "Adam-mini, adam_mini", "Adam-mini, derived"]
    assert document["setup"]["sharding"] == "zero2" and document["activations_estimate"]["stored"] > 0
    mini, adamw = document["rows"][2], document["rows"][0]
    assert mini["saved"]["AdamW, fp32 states"]["bytes"] == adamw["resident"] - mini["resident"] > 0
    main(command)
    text = capsys.readouterr().out
    assert "4 ranks, ZeRO-2 over 2, tensor parallel over 2" in text and "activations, an" not in text
    assert f"{mini['n_blocks']:,}" in text and all(name in text for name in names)


def test_code_is_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", f"{__name__}:made", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["elements"] == 8 * 16 + 16 + 32 and document["setup"]["dtype"] == "bf16"


def test_unrecognised_weights_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", f"{__name__}:strange"])
    assert "! 1 weights were not recognised" in capsys.readouterr().out


def strange() -> nn.Module:
    module = nn.Module()
    module.mystery = nn.Parameter(torch.zeros(3, 4, 5))
    return module


NOT_A_MODEL = 3


def nothing() -> int:
    return 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-9"], r"target 'llama-9' must be written module:attribute.*config\.json.*llama-3-8b"),
        ([], r"target is missing; pass config\.json"),
        (["no_such_module:make"], r"'no_such_module:make' cannot be imported.*run from the folder"),
        ([f"{__name__}:nothing"], r"gave a int, not a torch\.nn\.Module"),
        ([f"{__name__}:NOT_A_MODEL"], r"is a int, neither a model nor a function"),
        (["gpt2-125m", "--world", "8", "--tp", "3"], r"--tp 3 does not divide --world 8"),
        (["gpt2-125m", "--world", "0"], r"--world 0 must be a number of ranks >= 1"),
        (["gpt2-125m", "--world", "2", "--tp", "2"], r"--tp 2 does not divide the 50257 TOKEN_EMBEDDING"),
        (["gpt2-125m", "--batch", "1"], r"--batch 1 and --seq None go together"),
        (["gpt2-125m", "--rules", "no_rules"], r"rules='no_rules' is neither"),
        (["gpt2-125m", "--table", "x.md"], r"--table 'x\.md' covers .* leave out 'gpt2-125m'"),
        (["--table", "no/such/folder/x.md"], r"folder 'no/such/folder' does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["plan", *arguments])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not valid JSON.*config\.json"),
        ("[1]", r"holds a JSON list, not an object"),
        ('{"model_type": "llama", "vocab_size": 8, "vocab_size": 9}', r"bad\.json.*'vocab_size' is there 2 times"),
        ("{}", r"model_type=None and architectures=None.*set model_type"),
        ('{"model_type": "unheard_of"}', r"model_type='unheard_of'.*unknown to transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"cannot build a 'llama' model.*hidden_size"),
    ],
)
def test_bad_configurations_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_target(str(tmp_path / "bad.json"))
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_target(str(tmp_path))


def test_transformers_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        main(["plan", "gpt2-125m"])


def test_every_shipped_architecture_says_where_it_is_from() -> None:
    assert len(shipped()) == 11
    for name in shipped():
        document = facts(name)
        assert document["source"] and document["config"]["model_type"]
