"""What every rival must do to be compared: same groups, same schedule, same bits, and a state that a checkpoint keeps.

Whether a rival's update is that of its paper is held by ``test_rivals_updates``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh

import experiments.train as train_module
from experiments.checkpoints import State
from experiments.configs import TrainConfig
from experiments.grids import STUDIES, grid
from experiments.models import GPTConfig, LlamaConfig, MLPConfig, build, lm_loss
from experiments.optimizers import make_optimizer, require_coverage
from experiments.rivals import RIVALS, Setup, state_size
from experiments.rivals.hift import layers
from experiments.rivals.installed import PEERS
from experiments.rivals.parts import Parts
from experiments.rivals.table import size_row, tables, written
from experiments.train import train

LLAMA = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden=48)
DECAYS = {"lion": 10.0, "sgd": 0.0, "sm3": 0.0}
"""Weight decay as a multiple of the run's; 1 for all others."""
ROUND = {"hift": 3, "soap": 2}
"""Steps until every parameter has moved; 1 for all others."""


@pytest.fixture(params=list(RIVALS))
def arm(request: pytest.FixtureRequest) -> str:
    if "torchao" in RIVALS[request.param].library and not PEERS.is_dir():
        pytest.skip(f"torchao is not in {PEERS}; run `make peers`")
    return request.param


def make(arm: str, *, lr: float = 1e-3, weight_decay: float = 0.1, seed: int = 0) -> tuple[nn.Module, Any]:
    model = build(LLAMA, 0)
    optimizer = make_optimizer(model, arm, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, seed=seed)
    return model, optimizer


def loss_of(model: nn.Module, number: int) -> Tensor:
    """The loss on batch ``number``; all 256 tokens are in it, so no parameter lacks a gradient."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.stack([torch.randperm(256, generator=generator) for _ in range(2)]).view(16, 32)
    return lm_loss(model, (tokens, (tokens * 3 + 1) % 256))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    for number in numbers:
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if torch.equal(p, before[name])}


# -------------------------------------------------------------------------------------------------- updates


def test_every_parameter_moves(arm: str) -> None:
    model, optimizer = make(arm)
    require_coverage(model, optimizer)
    before = weights(model)
    advance(model, optimizer, 0)
    still = {"soap": set(before), "hift": set(before) - {"tok_embeddings.weight"}}.get(arm, set())
    assert unchanged(model, before) == still
    assert bool(RIVALS[arm].still) == (arm in ("soap", "hift", "microadam"))
    advance(model, optimizer, *range(1, ROUND.get(arm, 1)))
    assert unchanged(model, before) == set()


def test_weight_decay_is_decoupled_and_of_matrices_alone(arm: str) -> None:
    """Without a gradient, a step is the decay."""
    model, optimizer = make(arm, lr=0.01, weight_decay=0.5)
    before = weights(model)
    for _ in range(ROUND.get(arm, 1)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    kept = 1 - 0.01 * 0.5 * DECAYS.get(arm, 1.0)
    for name, p in model.named_parameters():
        expected = before[name] * (kept if p.dim() >= 2 else 1.0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9)
    assert ("no weight decay" in RIVALS[arm].takes) == (DECAYS.get(arm) == 0.0)


def test_the_loss_falls(arm: str) -> None:
    model, optimizer = make(arm, lr=RIVALS[arm].rates[1])
    start = loss_of(model, 0).item()
    advance(model, optimizer, *[0] * 40)
    assert loss_of(model, 0).item() < start - 0.3


# ------------------------------------------------------------------------------------------- learning rates


def test_a_rate_of_zero_leaves_the_weights(arm: str) -> None:
    model, optimizer = make(arm)
    advance(model, optimizer, *range(4))
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    advance(model, optimizer, *range(4, 8))
    assert unchanged(model, before) == set(before)


def test_twice_the_rate_is_twice_the_step_of_every_tensor(arm: str) -> None:
    """The trainer sets one rate in all groups, so a rival with two of them scales both."""
    moved = []
    for factor in (1, 2):
        model, optimizer = make(arm, weight_decay=0.0)
        advance(model, optimizer, *range(4))
        before = weights(model)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        advance(model, optimizer, 4)
        moved.append({name: p.detach().double() - before[name].double() for name, p in model.named_parameters()})
    assert any(move.abs().max() > 1e-5 for move in moved[0].values())
    for name in moved[0]:
        torch.testing.assert_close(2 * moved[0][name], moved[1][name], rtol=1e-3, atol=1e-6)


def test_a_part_has_a_rate_of_its_own() -> None:
    one, two = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    make_sgd = torch.optim.SGD
    optimizer = Parts([([{"params": [one]}], make_sgd), ([], make_sgd), ([{"params": [two]}], make_sgd)], 0.5,
                      scales=[1.0, 7.0, 0.1])  # fmt: skip
    one.grad, two.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.full((2,), 0.5))
    torch.testing.assert_close(two.detach(), torch.full((2,), 0.95))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.step(lambda: 3.0) == 3.0


# -------------------------------------------------------------------------------------------- bits and state


def test_bits_depend_on_the_seed_alone(arm: str) -> None:
    """The global generator is not used: a run that evaluates more often would be another run."""
    models = []
    for state in (1, 2):
        torch.manual_seed(state)
        model, optimizer = make(arm, seed=5)
        advance(model, optimizer, *range(4))
        models.append(model)
    assert unchanged(models[0], weights(models[1])) == set(weights(models[0]))


def test_only_apollo_draws_random_numbers(arm: str) -> None:
    models = []
    for seed in (1, 2):
        model, optimizer = make(arm, seed=seed)
        advance(model, optimizer, 0)
        models.append(model)
    differs = unchanged(models[0], weights(models[1])) != set(weights(models[0]))
    assert differs == (arm == "apollo_mini")


def test_a_loaded_state_goes_on_to_the_same_bits(arm: str) -> None:
    model, optimizer = make(arm)
    advance(model, optimizer, *range(5))
    file = io.BytesIO()
    torch.save(State(model, optimizer).state_dict(), file)
    file.seek(0)
    other, loaded = make(arm)
    State(other, loaded).load_state_dict(torch.load(file, weights_only=False))
    assert state_size(loaded) == state_size(optimizer)
    for one, two in ((model, optimizer), (other, loaded)):
        advance(one, two, *range(5, 18))
    assert unchanged(other, weights(model)) == set(weights(model))


class _Interrupted(BaseException):
    """Not an Exception: like a kill, it is not recorded."""


@pytest.mark.parametrize("arm", ["galore", "microadam", "muon", "soap", "hift"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Through the files of a checkpoint: objects, integers and lists have to survive them."""
    config, whole = dataclasses.replace(config, arm=arm), train_module._Run._one_step

    def step(self: Any) -> float:
        if self.step == 13:
            raise _Interrupted
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_one_step", step)
        with pytest.raises(_Interrupted):
            train(config, tmp_path / "interrupted")
    resumed, straight = train(config, tmp_path / "interrupted"), train(config, tmp_path / "straight")
    assert resumed["state"] == "finished" and resumed["weights_sha256"] == straight["weights_sha256"]
    assert resumed["state_bytes"] == straight["state_bytes"] > 0
    assert config.with_rules_hash().rules_hash == ""


def test_integers_and_bfloat16_are_loaded_as_they_were_saved() -> None:
    """torch casts loaded state to the parameter's dtype."""
    for arm in ("microadam", "adafactor_zhai"):
        (model, optimizer), (other, loaded) = make(arm), make(arm)
        advance(model, optimizer, 0)
        loaded.load_state_dict(optimizer.state_dict())
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert {k: v.dtype for k, v in optimizer.state[p].items()} == {
                k: v.dtype for k, v in loaded.state[q].items()
            }
    assert {torch.int16, torch.uint8, torch.bfloat16} <= {
        v.dtype for state in make_stepped("microadam").state.values() for v in state.values()
    }


def make_stepped(arm: str) -> torch.optim.Optimizer:
    model, optimizer = make(arm)
    advance(model, optimizer, 0)
    return optimizer


# ------------------------------------------------------------------------------------------------- counts


def test_state_has_the_size_that_the_registry_says(arm: str) -> None:
    shapes = {name: tuple(p.shape) for name, p in build(LLAMA, 0).named_parameters()}
    total = sum(map(math.prod, shapes.values()))
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    hidden = {name: shape for name, shape in matrices.items() if "layers" in name}
    vectors = total - sum(map(math.prod, matrices.values()))
    rest = total - sum(map(math.prod, hidden.values()))
    sides, rows = sum(map(sum, matrices.values())), sum(shape[0] for shape in hidden.values())
    thin = {name: min(32, *shape) for name, shape in hidden.items()}
    galore = sum(2 * thin[name] * max(shape) + thin[name] * min(shape) for name, shape in hidden.items())
    kept = sum(math.ceil(0.01 * math.prod(shape)) for shape in shapes.values())
    micro = sum(math.ceil(math.prod(shape) / 2) for shape in shapes.values()) + 2 * len(shapes) + 20 * kept
    expected = {
        "adafactor": sides + vectors, "adafactor_zhai": total + sides + vectors,
        "came": total + 2 * sides + vectors + len(shapes), "sm3": total + sides + vectors, "lion": total, "sgd": total,
        "muon": total + rest, "normuon": total + rest + rows, "adamuon": 2 * total,
        "soap": 2 * total + 2 * sum(a * a + b * b for a, b in matrices.values()),
        "galore": galore + 2 * rest,
        "apollo_mini": sum(2 * max(shape) + 1 for shape in hidden.values()) + 2 * rest,
        "scale": math.prod(shapes["output.weight"]) + 2 * vectors, "adamw8bit": 2 * total, "adamw4bit": 2 * total,
        "microadam": micro, "hift": 2 * total,
    }  # fmt: skip
    size = state_size(make_stepped(arm))
    assert size.values == expected[arm] and 0 <= size.first <= total


def test_bytes_of_quantized_state(arm: str) -> None:
    """Two tensors of 8192 values are quantized in 8 bits or 4: codes, a scale for each block, a table of 256 or 16."""
    size = {name: state_size(make_stepped(name)) for name in {arm, "sgd"}}[arm]
    small = 4 * (size.values - 2 * 2 * 8192)
    if arm == "adamw8bit":
        assert size.bytes == small + 4 * (8192 + 4 * 8192 // 256 + 4 * 256)
    elif arm == "adamw4bit":
        assert size.bytes == small + 4 * (8192 // 2 + 4 * 8192 // 128 + 4 * 16)
    elif arm not in ("microadam", "adafactor_zhai", "galore"):
        assert size.bytes == 4 * size.values


def test_status_counts_the_state(tmp_path: Path, config: TrainConfig) -> None:
    status = {arm: train(dataclasses.replace(config, arm=arm), tmp_path) for arm in ("torch_adamw", "adam_mini", "sgd")}
    count = status["sgd"]["parameters"]
    assert status["torch_adamw"]["state_values"] == 2 * status["torch_adamw"]["first_moment_values"] == 2 * count
    assert status["torch_adamw"]["state_bytes"] == 8 * count
    assert status["torch_adamw"]["second_moment_scalars"] == count
    mini = status["adam_mini"]  # It stores one value per index of an axis, equal within a block.
    rest = mini["state_values"] - mini["first_moment_values"]
    assert mini["first_moment_values"] == count and mini["second_moment_scalars"] < rest < 0.05 * count
    assert (status["sgd"]["second_moment_scalars"], status["sgd"]["state_values"]) == (0, count)


# -------------------------------------------------------------------------------------- which parameter is what


def parts(config: Any) -> Setup:
    return Setup.of(build(config, 0), lr=1.0, betas=(0.9, 0.9), weight_decay=0.1, seed=0)


def test_hidden_matrices_are_neither_embeddings_nor_the_output_layer() -> None:
    setup = parts(LLAMA)
    assert setup.hidden() == {name for name in setup.matrices() if name.startswith("layers.0.")}
    assert (setup.embeddings(), setup.output()) == ({"tok_embeddings.weight"}, {"output.weight"})
    untied, tied = parts(GPTConfig(n_layer=1)), parts(GPTConfig(n_layer=1, tied=True))
    assert (untied.output(), tied.output()) == ({"lm_head.weight"}, {"transformer.wte.weight"})
    assert untied.hidden() == tied.hidden() and len(tied.hidden()) == 4
    assert parts(MLPConfig()).output() == {"fc2.weight"}
    with_decay, without = setup.split(setup.hidden())
    names = [name for group in with_decay + without for name in group["param_names"]]
    assert sorted(names) == sorted(setup.names()) and {g["weight_decay"] for g in with_decay} == {0.1}


def test_layers_of_hift() -> None:
    numbers = layers(parts(dataclasses.replace(LLAMA, n_layers=2)))
    assert numbers["tok_embeddings.weight"] == 0 and numbers["output.weight"] == numbers["norm.weight"] == 3
    assert {numbers[name] for name in numbers if name.startswith("layers.1.")} == {2}
    assert layers(parts(MLPConfig())) == {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "fc2.bias": 1}
    tied = layers(parts(GPTConfig(n_layer=1, tied=True)))
    assert tied["transformer.wte.weight"] == 0 and tied["transformer.ln_f.bias"] == max(tied.values()) == 2


# ------------------------------------------------------------------------------------------------ refusals


def test_sharded_models_are_refused(tmp_path: Path, arm: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build(LLAMA, 0)
        mesh = init_device_mesh("cpu", (1,))
        model.output.weight = nn.Parameter(distribute_tensor(model.output.weight.detach(), mesh))
        with pytest.raises(ValueError, match=f"arm='{arm}' is not tested on sharded tensors; use parallel='ddp'"):
            make_optimizer(model, arm, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, seed=0)
    finally:
        dist.destroy_process_group()


def test_an_unknown_arm_is_told_all_arms(config: TrainConfig) -> None:
    wanted = (
        r"arm='adam' is no rule set \(adam_mini, .*slim_adam\).*permuted, torch_adamw.*no rival \(adafactor, .*hift"
    )
    with pytest.raises(ValueError, match=wanted):
        dataclasses.replace(config, arm="adam").with_rules_hash()
    with pytest.raises(ValueError, match=wanted):
        make_optimizer(build(LLAMA, 0), "adam", lr=1.0, betas=(0.9, 0.9), weight_decay=0.0, seed=0)


@pytest.mark.parametrize(
    ("arm", "module", "message"),
    [
        ("soap", "pytorch_optimizer", r"pip install -e '\.\[experiments\]'"),
        ("adamw8bit", "torchao.optim", "make peers"),
    ],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, arm: str, module: str, message: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=message):
        make(arm)


# --------------------------------------------------------------------------------------------------- study


def test_rates_are_a_factor_of_three_apart_and_the_study_takes_them() -> None:
    for rival in RIVALS.values():
        steps = [b / a for a, b in zip(rival.rates, rival.rates[1:], strict=False)]
        assert 3 <= len(rival.rates) <= 4 and all(2.9 < step < 3.5 for step in steps), rival.name
    runs = grid("cpu", ("came", "elementwise"), "rivals")
    assert {run.lr for run in runs if run.arm == "came"} == set(RIVALS["came"].rates)
    assert {run.lr for run in runs if run.arm == "elementwise"} == set(STUDIES["rivals"].rates)
    assert {run.arm for run in grid("smoke", None, "rivals")} == {"elementwise", *RIVALS}


def test_the_page_has_the_rows_of_the_registry(arm: str) -> None:
    """`python -m experiments.rivals` writes them."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "rivals.md").read_text(encoding="utf-8")
    assert tables() in page and size_row(arm) in page
    assert written(page, []).partition("<!-- tables end -->")[2] == page.partition("<!-- tables end -->")[2]
    with pytest.raises(ValueError, match=r"the page lacks .*tables begin"):
        written("# Another page", [])


def test_results_from_before_are_still_found() -> None:
    """A rival's field in the config would give every committed run another name."""
    for study in ("ablation", "carry_over", "statistics"):
        folder = Path(__file__).resolve().parents[2] / "results" / f"{study}_cpu"
        hashes = {run.with_rules_hash().hash for run in grid("cpu", None, study)}
        assert hashes == {path.name for path in folder.iterdir()}
        assert "state_bytes" not in json.loads((folder / min(hashes) / "status.json").read_text())
