"""The paper's recipes: their arithmetic, two steps of each at a reduced size, and the plan of the profile ``gpu``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments import ablation, gpu_plan
from experiments.configs import TrainConfig, byte_gpt, byte_llama
from experiments.fields import document_of
from experiments.models import GPTConfig, LlamaConfig, build
from experiments.recipes import DIVISOR, LARGE, RECIPES, TRAINED, reduced
from experiments.train import Options, learning_rate, run_folder, train
from optimizer.tools.architectures import facts
from tests.experiments import processes, ranks

SHAPES = {"gpt2-1.5b": "gpt2-1.5b", "llama2-7b": "llama-2-7b", "llama2-13b": "llama-2-13b", "llama3-8b": "llama-3-8b"}


def parameters(config: TrainConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config.model, 0).parameters())


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("llama-")])
def test_llamas_have_the_parameters_and_tokens_that_they_are_named_for(name: str) -> None:
    config, count = RECIPES[name](), parameters(RECIPES[name]())
    named = float(name.split("-")[1][:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert count == pytest.approx(named, rel=0.06 if name == "llama-1b" else 0.01)
    assert config.batch * config.seq_len == 131_072
    assert config.steps * 131_072 / count == pytest.approx(26, abs=1.3)


@pytest.mark.parametrize("name", ["gpt2-125m", "gpt2-330m", "gpt2-1.5b"])
def test_gpt2_follows_its_schedule(name: str) -> None:
    config, (peak, least) = (
        RECIPES[name](),
        {"125m": (6e-4, 3e-5), "330m": (3e-4, 6e-5), "1.5b": (1e-4, 1e-5)}[name[5:]],
    )
    assert config.batch * config.seq_len == 491_520
    assert learning_rate(config, 1_999) == pytest.approx(peak)
    assert learning_rate(config, 999) == pytest.approx(peak / 2)
    assert learning_rate(config, 51_000) == pytest.approx((peak + least) / 2)  # the middle of the cosine
    assert learning_rate(config, 99_999) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_shipped_architectures(name: str) -> None:
    model, shipped = RECIPES[name]().model, facts(SHAPES[name])["config"]
    if isinstance(model, GPTConfig):
        found = (model.n_embd, model.n_layer, model.n_head)
        assert found == (shipped["n_embd"], shipped["n_layer"], shipped["n_head"])
        assert 0 <= model.vocab - shipped["vocab_size"] < 64
        return
    assert isinstance(model, LlamaConfig)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size")  # fmt: skip
    found = (model.vocab, model.dim, model.n_layers, model.n_heads, model.n_kv_heads, model.hidden)
    assert found == tuple(shipped[key] for key in names)


def test_older_configs_keep_their_documents() -> None:
    """Fields that were added later are in no older document, so that its hash, a folder's name, stays."""
    for make in (byte_llama, byte_gpt):
        document = make().to_dict()
        assert not {"precision", "decay", "lr_end"} & document.keys()
        assert not {"init", "bias"} & document["model"].keys()
        assert TrainConfig.from_dict(document) == make()
    assert byte_llama().hash == "b2a7466b75cc"
    changed = dataclasses.replace(byte_llama(), precision="bf16")
    assert document_of(changed)["precision"] == "bf16" and TrainConfig.from_dict(changed.to_dict()) == changed
    for make in RECIPES.values():
        assert TrainConfig.from_dict(make().to_dict()) == make()


# -------------------------------------------------------------------------------- two steps, at a reduced size


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_at_a_reduced_size(tmp_path: Path, name: str) -> None:
    """In bf16, as the recipe says; with micro-batches, and recomputed layers for the large ones."""
    config = reduced(RECIPES[name]())
    status = train(config, tmp_path, Options(micro_batch=3, recompute=name in LARGE))
    assert (status["state"], status["steps"]) == ("finished", 2)
    start = torch.tensor(float(config.model.vocab)).log()
    assert status["final_val_loss"] < start + 0.5


def test_a_reduced_recipe_has_the_same_kinds_of_parameters() -> None:
    for make in RECIPES.values():
        whole, small = make(), reduced(make())
        with torch.device("meta"):
            names = [{n for n, _ in build(c.model, 0).named_parameters() if ".2." not in n} for c in (whole, small)]
        assert {n for n in names[0] if not any(f".{i}." in n for i in range(2, 100))} == names[1]
        kept = ("precision", "decay", "lr", "lr_end", "beta1", "beta2", "weight_decay", "clip", "arm")
        assert all(getattr(whole, field) == getattr(small, field) for field in kept)
        assert small.model.vocab * DIVISOR == whole.model.vocab


@pytest.mark.parametrize(("kind", "name"), [("ddp", "gpt2-125m"), ("fsdp2", "llama-39m")])
def test_a_recipe_on_two_ranks(tmp_path: Path, kind: str, name: str) -> None:
    """Autocast under DDP and FSDP2's own mixed precision, against one process in fp32."""
    config = dataclasses.replace(reduced(RECIPES[name]()), steps=4, eval_every=4)
    options = Options(parallel=kind, micro_batch=1, recompute=True)  # type: ignore[arg-type]
    ranks.start(ranks.whole_run, config, tmp_path, options, log=tmp_path / "log")
    status = processes.status(run_folder(tmp_path, config.with_rules_hash()))
    alone = train(dataclasses.replace(config, precision="fp32"), tmp_path)
    assert status["state"] == "finished"
    assert status["final_val_loss"] == pytest.approx(alone["final_val_loss"], rel=5e-3)
    # In fp32, two ranks and one differ by 1e-7.
    assert abs(status["final_val_loss"] / alone["final_val_loss"] - 1) > 2e-6, status["final_val_loss"]


# ------------------------------------------------------------------------------------------------------ the plan


def test_the_plan_counts_what_the_runs_are() -> None:
    (runs,) = gpu_plan.chosen("llama-271m").values()
    assert [config.arm for config in runs] == list(gpu_plan.ARMS)
    one, eight = (gpu_plan.need(runs, Options(parallel="fsdp2"), n) for n in (1, 8))
    count = parameters(runs[0])
    assert one.parameters == count and one.tokens == 54_200 * 131_072
    assert one.resident["torch_adamw"] == pytest.approx(16 * count, rel=1e-4)  # weight, gradient and two moments
    assert one.resident["adam_mini"] == pytest.approx(12 * count, rel=0.01)
    assert eight.resident["torch_adamw"] == pytest.approx(one.resident["torch_adamw"] / 8, rel=1e-3)
    assert gpu_plan.need(runs, Options(), 8).resident == one.resident  # DDP shards nothing


def test_the_micro_batch_fits_its_budget() -> None:
    for make in RECIPES.values():
        config = make()
        rows = gpu_plan.fitting_micro_batch(config, 1)
        assert rows == 1 or gpu_plan.activation_bytes(config, rows) <= gpu_plan.BUDGET
        assert rows == config.batch or gpu_plan.activation_bytes(config, 2 * rows) > gpu_plan.BUDGET


def test_the_dry_run_prints_every_recipe_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablation.main(profile="gpu", dry_run=True, results=tmp_path)
    said = capsys.readouterr().out
    assert set(TRAINED) <= set(said.split()) and "llama3-8b" not in said
    assert "Nothing of this was measured on a device" in said and not list(tmp_path.iterdir())
    for study, arms, message in (
        ("llama-9b", (), "study='llama-9b' is no recipe"),
        ("llama-1b", ("permuted",), r"arms=\['permuted'\]"),
    ):
        with pytest.raises(SystemExit) as ended:
            ablation.main(profile="gpu", dry_run=True, results=tmp_path, study=study, arms=arms)
        assert ended.value.code == 2 and message.replace("\\", "") in capsys.readouterr().err


def test_the_profile_trains_on_cuda_with_a_micro_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_many(configs: list[TrainConfig], root: Path, *, workers: int, each: ablation.Launch) -> ablation.Outcome:
        seen.append((len(configs), each.options))
        return ablation.Outcome(len(configs), ())

    monkeypatch.setattr(ablation, "run_many", run_many)
    ablation.main(profile="gpu", study="llama-39m", results=tmp_path, processes=2)
    assert seen == [(4, Options(device="cuda", micro_batch=64))]


# ------------------------------------------------------------------------------------------------------ the page


def row(name: str) -> str:
    """A recipe's row in docs/gpu.md."""
    config = RECIPES[name]()
    model = config.model
    if isinstance(model, GPTConfig):
        sizes = f"{model.n_embd} x {model.n_layer}, {model.n_head} heads"
    else:
        assert isinstance(model, LlamaConfig)
        heads = f"{model.n_heads}" + (f" ({model.n_kv_heads} kv)" if model.n_kv_heads < model.n_heads else "")
        sizes = f"{model.dim} x {model.n_layers}, {heads} heads, {model.hidden}"
    tokens = config.steps * config.batch * config.seq_len
    warm, lowest = round(config.warmup * config.steps), f"{config.lr * config.lr_end:g}"
    return (
        f"| `{name}` | {sizes} | {parameters(config) / 1e6:,.0f}M | {config.lr:g} to {lowest} | {config.batch} x "
        f"{config.seq_len} | {config.steps:,} | {warm:,} | {tokens / 1e9:.1f}B |"
    )


def test_the_page_has_the_numbers_of_the_recipes() -> None:
    page = (processes.ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert row(name) in page, row(name)
