"""``param_groups`` edited by hand: every parameter in them is stepped, as by AdamW, with the layout that is its own.

Under rules ``elementwise`` a wrong layout would not show, so trajectories are compared with AdamW's there, and layouts
with those of an optimizer that was built from the edited groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adam_mini import Adam_mini
from optimizer import AdamMini, Layout, partition, tag
from optimizer.memory import gradient_release
from tests.optimizer.models import Llama, batch, loss_of

Groups = list[dict[str, Any]]


def layouts_of(optimizer: AdamMini) -> dict[int, Layout]:
    optimizer.state_bytes()
    return {
        id(p): layout
        for group, own in zip(optimizer.param_groups, optimizer.layouts, strict=True)
        for p, layout in zip(group["params"], own, strict=True)
    }


def give(parameters: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def appended(groups: Groups, extra: nn.Parameter) -> None:
    groups[0]["params"].append(extra)


def inserted(groups: Groups, extra: nn.Parameter) -> None:
    groups[0]["params"].insert(1, extra)


def removed(groups: Groups, extra: nn.Parameter) -> None:
    del groups[0]["params"][2]


def reversed_(groups: Groups, extra: nn.Parameter) -> None:
    groups[0]["params"].reverse()


def replaced(groups: Groups, extra: nn.Parameter) -> None:
    groups[0]["params"] = [extra]


def group_appended(groups: Groups, extra: nn.Parameter) -> None:
    groups.append({**groups[0], "params": [extra], "lr": 0.5})
    groups[-1].pop("param_names", None)


def group_removed(groups: Groups, extra: nn.Parameter) -> None:
    groups.append({**groups[0], "params": groups[0]["params"][:2]})
    del groups[0]


def moved(groups: Groups, extra: nn.Parameter) -> None:
    groups.append({**groups[0], "params": [groups[0]["params"].pop(0)], "lr": 0.25})


EDITS: tuple[Callable[[Groups, nn.Parameter], None], ...] = (
    appended, inserted, removed, reversed_, replaced, group_appended, group_removed, moved,
)  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_edits_do_what_they_do_to_adamw(
    edit: Callable[[Groups, nn.Parameter], None], before: int, options: dict[str, Any]
) -> None:
    runs = []
    for make in (AdamMini, torch.optim.AdamW):
        torch.manual_seed(0)
        tensors = [nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
        extra = nn.Parameter(torch.randn(5, 7))
        rules = {"rules": "elementwise"} if make is AdamMini else {}
        optimizer = make(tensors, lr=0.1, weight_decay=0.1, **rules, **options)  # type: ignore[operator]
        for k in range(before):
            give(tensors, k)
            optimizer.step()
        edit(optimizer.param_groups, extra)
        for k in range(3):
            give([*tensors, extra], 10 + k)
            optimizer.step()
        runs.append([*tensors, extra])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edit", EDITS[1:])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "build",
    [
        lambda m: AdamMini(m.named_parameters()),
        lambda m: AdamMini(m.parameters()),
        lambda m: AdamMini(list(tag(m).parameters())),
        lambda m: Adam_mini(m),
    ],
    ids=["names", "parameters", "tagged", "published"],
)
def test_layouts_follow_their_parameters(
    edit: Callable[[Groups, nn.Parameter], None], steps: int, build: Callable[[nn.Module], AdamMini]
) -> None:
    model, spare = Llama(), nn.Linear(7, 5)
    optimizer = build(model)
    wanted = {id(p): layout for p, layout in zip(model.parameters(), partition(model).values(), strict=True)}
    names = {id(p): name for name, p in model.named_parameters()}
    for k in range(steps):
        loss_of(model, batch(11, k)).backward()
        optimizer.step()
    edit(optimizer.param_groups, spare.weight)
    for key, layout in layouts_of(optimizer).items():
        if key != id(spare.weight):
            assert layout == wanted[key], names[key]
    for group in optimizer.param_groups:
        for p, name in zip(group["params"], group.get("param_names") or [], strict=False):
            assert p is spare.weight or name == names[id(p)]
        assert len(group.get("param_names") or group["params"]) == len(group["params"])
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for gone in set(optimizer.state) - held:  # torch's state_dict wants it so
        del optimizer.state[gone]
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_parameter_of_the_model_is_known_when_it_comes_later() -> None:
    model = Llama()
    frozen = model.layers[0].attention.wq.weight.requires_grad_(False)
    optimizer = AdamMini(model, weight_decay=0.1)
    frozen.requires_grad_()
    optimizer.param_groups[0]["params"].append(frozen)
    assert layouts_of(optimizer)[id(frozen)] == partition(model)["layers.0.attention.wq.weight"]
    assert optimizer.param_groups[0]["param_names"][-1] == "layers.0.attention.wq.weight"
    model = Llama()
    bare = model.layers[0].attention.wq.weight.requires_grad_(False)
    optimizer = AdamMini(model)
    optimizer.add_param_group({"params": [("layers.0.attention.wq.weight", bare.requires_grad_())]})
    assert layouts_of(optimizer)[id(bare)] == partition(model)["layers.0.attention.wq.weight"]


def test_a_parameter_that_took_the_place_of_a_freed_one_is_not_taken_for_it() -> None:
    """CPython gives the id of a freed tensor to the next one: here each new parameter gets its neighbour's."""
    shapes = [(6, 6)] * 6
    optimizer = AdamMini([(f"layers.{i}.{n}.weight", nn.Parameter(torch.randn(s)))
                          for i, (s, n) in enumerate(zip(shapes, ["o_proj", "down_proj", "embed_tokens"] * 2,
                                                         strict=True))], rules="slim_adam")  # fmt: skip
    before = list(optimizer.layouts[0])
    assert len(set(before)) > 1
    params = optimizer.param_groups[0]["params"]
    old = set(map(id, params))
    params[:] = [torch.empty(1)] * len(params)  # as Accelerate does, while FSDP2 makes the parameters anew
    fresh = [nn.Parameter(torch.randn(s)) for s in shapes]
    params[:] = reversed(fresh)
    assert old & set(map(id, params)), "no id was used again: the case shows nothing"
    optimizer.init_state()
    assert optimizer.layouts[0] == before


def test_a_flat_piece_in_the_place_of_a_matrix_is_refused_when_it_is_stepped() -> None:
    optimizer = AdamMini(
        [("mlp.w1.weight", nn.Parameter(torch.ones(4, 3))), ("norm.weight", nn.Parameter(torch.ones(4)))]
    )
    params = optimizer.param_groups[0]["params"]
    params[1] = nn.Parameter(torch.ones(6))  # a vector for a vector is another parameter
    give(params, 0)
    optimizer.step()
    params[0] = nn.Parameter(torch.ones(7))
    give(params, 0)
    with pytest.raises(ValueError, match=r"mlp.w1.weight.* has shape \(7,\)"):
        optimizer.step()


def test_gradient_release_steps_what_was_appended() -> None:
    model, more = Llama(), nn.Parameter(torch.ones(3, 2))
    optimizer = AdamMini(model)
    gradient_release(optimizer)
    optimizer.param_groups[0]["params"].append(more)
    optimizer.step()
    more.sum().backward()
    assert not torch.equal(more, torch.ones(3, 2)) and more.grad is None


def test_names_that_the_caller_edits_too_are_the_callers() -> None:
    model, more = Llama(), nn.Linear(3, 2)
    optimizer = AdamMini(model.named_parameters())
    optimizer.param_groups[0]["params"].append(more.weight)
    optimizer.param_groups[0]["param_names"].append("more.weight")
    give([more.weight], 0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"][-1] == "more.weight"


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda g, p: g[0]["params"].append(p), ValueError, r"param_groups\[0\]\['params'\]\[2\].*twice"),
        (lambda g, p: g[0]["params"].append(("a.weight", p)), TypeError, "not a tensor; append the parameter itself"),
        (lambda g, p: g.append(p), TypeError, r"param_groups\[1\] is .*add_param_group"),
        (lambda g, p: g.append({"params": p}), TypeError, r"param_groups\[1\] is a dict.*add_param_group"),
        (lambda g, p: g.append({"params": [nn.Parameter(p.clone())], "lr": -1.0}), ValueError, "lr=-1.0"),
        (lambda g, p: g[0]["params"].append(nn.UninitializedParameter()), ValueError, "run one forward pass"),
    ],
)
def test_what_cannot_be_stepped_is_refused(edit: Callable[[Any, Any], None], error: Any, words: str) -> None:
    tensors = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 3))]
    optimizer = AdamMini(tensors, lr=0.1)
    give(tensors, 0)
    edit(optimizer.param_groups, tensors[0])
    for _ in range(2):
        with pytest.raises(error, match=words):
            optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in tensors), "something moved"


def test_a_raw_group_gets_the_options_it_lacks() -> None:
    tensors = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = AdamMini(tensors[:1], lr=0.1)
    optimizer.param_groups.append({"params": tensors[1:], "lr": 0.2})
    give(tensors, 0)
    optimizer.step()
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    assert not torch.equal(tensors[1], torch.ones(4, 3))


def test_a_compiled_step_follows_too() -> None:
    torch._dynamo.reset()
    tensors = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    optimizer = AdamMini(tensors[:2], lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for k in range(4):
        give(tensors, k)
        step()
        if k == 1:
            optimizer.param_groups[0]["params"].append(tensors[2])
    assert not torch.equal(tensors[2], torch.ones(4, 3)) and optimizer.state[tensors[2]]["step"] == 2


# --- lazy parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [AdamMini, Adam_mini])
@pytest.mark.parametrize(
    "given", [lambda m: m, lambda m: m.parameters(), lambda m: m.named_parameters(), lambda m: list(m.parameters())]
)
def test_a_lazy_module_is_refused_until_it_has_run(make: Any, given: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))
    with pytest.raises((ValueError, RuntimeError), match=r"run one forward pass|Call `forward` to initialize"):
        make(given(model))
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="run one forward pass"):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1
    model(torch.ones(2, 3))
    optimizer.add_param_group({"params": list(model.parameters())})
    give(list(model.parameters()), 0)
    optimizer.step()
    make(given(model)).step()


# --- frozen parameters that were thawed -----------------------------------------------------------------------------


def thawed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "do not train" in record.getMessage()]


def test_thawed_parameters_that_no_group_holds_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="optimizer")
    model = Llama()
    model.layers[0].requires_grad_(False)
    optimizer = AdamMini(model)
    for k in range(4):
        loss_of(model, batch(11, k)).backward()
        optimizer.step()
        assert not thawed(caplog) if k < 2 else len(thawed(caplog)) == 1
        if k == 1:
            model.layers[0].attention.requires_grad_()
    (message,) = thawed(caplog)
    assert "layers.0.attention.wq.weight" in message and "add_param_group" in message


def test_thawed_parameters_that_were_given_to_a_group_are_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="optimizer")
    model = Llama()
    model.layers[0].requires_grad_(False)
    optimizer = AdamMini(model)
    model.layers[0].requires_grad_()
    optimizer.add_param_group({"params": list(model.layers[0].named_parameters(prefix="layers.0"))})
    for k in range(3):
        loss_of(model, batch(11, k)).backward()
        optimizer.step()
    assert not caplog.records


def test_a_model_without_frozen_parameters_has_none_to_look_at() -> None:
    assert not AdamMini(Llama())._frozen and not AdamMini(Llama().named_parameters())._frozen


def test_a_step_looks_at_few_of_many_frozen_parameters() -> None:
    """The bound holds, and none is left out for good."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(500)), nn.Linear(1, 1))
    model[:500].requires_grad_(False)
    optimizer, seen = AdamMini(model), set()
    assert optimizer._frozen is not None and len(optimizer._frozen) == 1000
    for _ in range(20):
        for one in model:
            one.weight.grad = None
        before = list(optimizer._frozen._waiting)
        optimizer.step()
        after = list(optimizer._frozen._waiting)
        count = next(k for k in range(len(before)) if after[0] is before[k])
        assert count <= 64
        seen |= {name for _, _, name in before[:count]}
    assert len(seen) == 1000
