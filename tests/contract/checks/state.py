"""State: what it is, and that it survives saving, loading, copying and pickling."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from tests.contract.harness import (
    LR,
    Named,
    assert_close,
    assert_refused,
    assert_same,
    check,
    give_gradients,
    named,
    one,
    ours,
    pair,
    random_steps,
    set_all,
    state_of,
    tensors,
    trained,
)
from tests.contract.subjects import Subject


def resumes(subject: Subject, document: Any, source: Any, pairs: Named, **options: Any) -> Any:
    """A fresh optimizer that loads ``document`` goes on as ``source`` does, bit by bit."""
    others = [(name, nn.Parameter(p.detach().clone())) for name, p in pairs]
    target = subject.make(others, **{"lr": 0.5, **options})  # of another rate: the checkpoint's is to win
    target.load_state_dict(document)
    random_steps(source, tensors(pairs), 3, start=50)
    random_steps(target, tensors(others), 3, start=50)
    assert_same(tensors(pairs), tensors(others))
    return target


@check
def state_starts_empty(subject: Subject) -> None:
    """No memory is spent on parameters that never get a gradient, and DCP knows from it that state must be made."""
    assert len(subject.make(named()).state) == 0


@check
def looking_at_state_is_harmless(subject: Subject) -> None:
    """optimizer.state[p] before the first step is {} and does not keep the state from being made."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR)
    assert all(optimizer.state[p] == {} for p in tensors(pairs))
    random_steps(optimizer, tensors(pairs))
    assert_same(tensors(pairs), tensors(trained(subject)[1]))


@check
def state_has_adams_names(subject: Subject) -> None:
    """FSDP, DCP and tools look for step, exp_avg and exp_avg_sq; exp_avg has the parameter's shape and dtype.

    A factored second moment has means of columns as well.
    """
    optimizer, pairs = trained(subject)
    for p in tensors(pairs):
        state = optimizer.state[p]
        assert set(state) - {"exp_avg_sq_col"} == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == p.shape and state["exp_avg"].dtype == p.dtype


@check
def steps_are_zero_dim_float32_tensors(subject: Subject) -> None:
    """Every torch optimizer counts in a 0-dim float32 tensor; FSDP and capturable code rely on it."""
    optimizer, pairs = trained(subject)
    steps = [optimizer.state[p]["step"] for p in tensors(pairs)]
    assert all(isinstance(s, torch.Tensor) and s.shape == () and s.dtype == torch.float32 for s in steps)
    assert [s.item() for s in steps] == [3.0] * len(pairs)
    assert len({s.data_ptr() for s in steps}) == len(steps), "two parameters share a counter"


@check
def a_checkpoint_speaks_of_positions(subject: Subject) -> None:
    """state_dict() holds numbers for parameters, and the weights themselves nowhere."""
    optimizer, pairs = trained(subject)
    document = optimizer.state_dict()
    assert document.keys() == {"state", "param_groups"}
    assert [i for group in document["param_groups"] for i in group["params"]] == list(range(len(pairs)))
    assert set(document["state"]) == set(range(len(pairs)))
    assert [n for group in document["param_groups"] for n in group["param_names"]] == [
        n for group in optimizer.param_groups for n in group["param_names"]
    ]


@check
def a_checkpoint_costs_no_copy(subject: Subject) -> None:
    """state_dict() refers to the live tensors: DCP loads into them, and saving does not double the memory."""
    optimizer, _ = trained(subject)
    live = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    document = optimizer.state_dict()["state"]
    saved = [t for state in document.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert live and {t.data_ptr() for t in saved} == {t.data_ptr() for t in live}


@check
def a_checkpoint_resumes_to_the_bit(subject: Subject) -> None:
    """torch.save, torch.load(weights_only=True), go on: the same weights as without the interruption."""
    optimizer, pairs = trained(subject, weight_decay=0.1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumes(subject, torch.load(buffer, weights_only=True), optimizer, pairs)


@check
def a_bfloat16_checkpoint_resumes_to_the_bit(subject: Subject) -> None:
    """With bf16 weights the state's dtypes survive the round trip."""
    pairs = named(dtype=torch.bfloat16)
    optimizer = subject.make(pairs, lr=LR)
    random_steps(optimizer, tensors(pairs))
    dtypes = [value.dtype for value in state_of(optimizer, tensors(pairs))]
    target = resumes(subject, copy.deepcopy(optimizer.state_dict()), optimizer, pairs)
    assert [value.dtype for group in target.param_groups for value in state_of(target, group["params"])] == dtypes


@check
def a_checkpoint_takes_the_models_dtype(subject: Subject) -> None:
    """A float32 run continued in bfloat16: the first moment follows the weights, the counters stay float32."""
    optimizer, _ = trained(subject)
    target = subject.make(pairs := named(dtype=torch.bfloat16), lr=LR)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    random_steps(target, tensors(pairs), 1, start=3)
    for p in tensors(pairs):
        assert target.state[p]["exp_avg"].dtype == torch.bfloat16 and target.state[p]["step"].dtype == torch.float32
        assert target.state[p]["step"] == 4 and p.isfinite().all()


@check
def a_checkpoint_before_the_first_step_loads(subject: Subject) -> None:
    """A job that dies at once leaves a checkpoint without state."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR)
    resumes(subject, optimizer.state_dict(), optimizer, pairs)


@check
def a_checkpoint_with_state_for_some_loads(subject: Subject) -> None:
    """Parameters that had no gradient yet have no state, and get theirs later."""
    pairs = named()
    optimizer = subject.make(pairs, lr=LR)
    random_steps(optimizer, tensors(pairs[1:]))
    resumes(subject, copy.deepcopy(optimizer.state_dict()), optimizer, pairs)


@check
def a_checkpoint_replaces_what_was_there(subject: Subject) -> None:
    """Loading into an optimizer that has stepped already leaves nothing of its own state."""
    optimizer, pairs = trained(subject)
    target, others = trained(subject, 5, start=20, seed=1)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(tensors(pairs), tensors(others), strict=True):
        q.data.copy_(p)
    random_steps(optimizer, tensors(pairs), 3, start=50)
    random_steps(target, tensors(others), 3, start=50)
    assert_same(tensors(pairs), tensors(others))


@check
def a_checkpoint_brings_its_options(subject: Subject) -> None:
    """lr, betas, eps and weight_decay are the checkpoint's; the running script's are overridden."""
    optimizer, _ = trained(subject, betas=(0.5, 0.75), eps=0.25, weight_decay=0.125)
    target = subject.make(named(), lr=0.5)
    target.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(target.param_groups, optimizer.param_groups, strict=True):
        assert all(mine[key] == theirs[key] for key in ("lr", "betas", "eps", "weight_decay"))


@check
def counters_may_be_numbers(subject: Subject) -> None:
    """Checkpoints of torch 1.x and of converters have step as a Python number."""
    optimizer, pairs = trained(subject)
    document = copy.deepcopy(optimizer.state_dict())
    for kind in (int, float):
        for state in document["state"].values():
            state["step"] = kind(state["step"])
        target = subject.make(named(), lr=LR)
        target.load_state_dict(document)
        assert all(s["step"].item() == 3 and s["step"].dtype == torch.float32 for s in target.state.values())
    resumes(subject, document, optimizer, pairs)


@check
def old_checkpoints_lack_newer_options(subject: Subject) -> None:
    """Checkpoints from before foreach, maximize, capturable, differentiable and fused load and train on."""
    optimizer, pairs = trained(subject)
    document = copy.deepcopy(optimizer.state_dict())
    for group in document["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused", "exp_avg_dtype", "bf16_rounding"):
            group.pop(key, None)
    target = resumes(subject, document, optimizer, pairs)
    assert all(group["maximize"] is False and "fused" in group for group in target.param_groups)


@check
def a_checkpoint_of_other_groups_is_refused(subject: Subject) -> None:
    """More groups, or a group of another length, is a ValueError, and nothing has changed."""
    optimizer, pairs = trained(subject)
    for shapes in ({"a.weight": (3, 4)}, {f"{i}.weight": (3, 4) for i in range(9)}):
        other = subject.make(others := named(shapes=shapes), lr=0.5)
        random_steps(other, tensors(others))
        groups = [{"params": [p]} for p in tensors(others)]
        for wrong in (other, subject.make(groups)):
            assert_refused(ValueError, lambda wrong=wrong: optimizer.load_state_dict(wrong.state_dict()))
    assert optimizer.param_groups[0]["lr"] == LR
    assert_same(*_continued(subject, optimizer, pairs))


def _continued(subject: Subject, optimizer: Any, pairs: Named) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    random_steps(optimizer, tensors(pairs), 2, start=3)
    return tensors(pairs), tensors(trained(subject, 5)[1])


@check
def loading_leaves_the_document_alone(subject: Subject) -> None:
    """The loaded groups are not the document's: a changed rate does not change the checkpoint in memory."""
    optimizer, _ = trained(subject)
    document = copy.deepcopy(optimizer.state_dict())
    target = subject.make(named(), lr=0.5)
    target.load_state_dict(document)
    set_all(target, lr=0.25)
    assert document.keys() == {"state", "param_groups"}
    assert all(group["lr"] == LR and group["params"] for group in document["param_groups"])


@check(applies=ours)
def loading_never_shares_tensors(subject: Subject) -> None:
    """Two runs resumed from one checkpoint in memory must not write into each other; torch's own do."""
    optimizer, _ = trained(subject)
    document = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        others = named()
        target = subject.make(others, lr=LR)
        target.load_state_dict(document)
        random_steps(target, tensors(others))
    for state, other in zip(document["state"].values(), optimizer.state.values(), strict=True):
        assert_same([state[key] for key in sorted(state)], [other[key] for key in sorted(other)])


@check
def names_in_a_checkpoint_win(subject: Subject) -> None:
    """A model's parameters were renamed: torch takes over the checkpoint's names, ours keeps those of its layouts.

    Where the checkpoint has no names, the optimizer keeps its own.
    """
    optimizer, _ = trained(subject)
    document = copy.deepcopy(optimizer.state_dict())
    own = [list(group["param_names"]) for group in optimizer.param_groups]
    for group in document["param_groups"]:
        group["param_names"] = [f"saved.{name}" for name in group["param_names"]]
    target = subject.make(named())
    target.load_state_dict(document)
    saved = [[f"saved.{n}" for n in names] for names in own]
    assert [g["param_names"] for g in target.param_groups] == (own if subject.ours else saved)
    for group in document["param_groups"]:
        del group["param_names"]
    target = subject.make(named())
    target.load_state_dict(document)
    assert [g["param_names"] for g in target.param_groups] == own


@check
def another_order_loads_by_name(subject: Subject) -> None:
    """torch's documented recipe: a pre-hook that reorders the state by param_names."""
    shapes = {f"blocks.{i}.mlp.up_proj.weight": (3 + i, 4) for i in range(3)}
    pairs = named(shapes=shapes)
    optimizer = subject.make(pairs, lr=LR)
    random_steps(optimizer, tensors(pairs))
    others = [(name, nn.Parameter(p.detach().clone())) for name, p in reversed(pairs)]
    target = subject.make(others, lr=LR)

    def reorder(o: Any, document: dict[str, Any]) -> dict[str, Any]:
        saved = {n: i for g in document["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        groups, state, position = [], {}, 0
        for group, old in zip(o.param_groups, document["param_groups"], strict=True):
            keys = list(range(position, position := position + len(group["params"])))
            state.update({k: document["state"][saved[n]] for k, n in zip(keys, group["param_names"], strict=True)})
            groups.append({**old, "params": keys, "param_names": list(group["param_names"])})
        return {"state": state, "param_groups": groups}

    target.register_load_state_dict_pre_hook(reorder)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (50, 51):
        give_gradients(tensors(pairs), step)
        for (_, p), (_, q) in zip(pairs, reversed(others), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        target.step()
    assert_same(tensors(pairs), tensors(list(reversed(others))))
    assert [n for g in target.param_groups for n in g["param_names"]] == list(reversed(shapes))


@check
def a_deep_copy_is_independent(subject: Subject) -> None:
    """copy.deepcopy((params, optimizer)) trains on as the original does, and apart from it."""
    optimizer, pairs = trained(subject)
    others, twin = copy.deepcopy((pairs, optimizer))
    random_steps(optimizer, tensors(pairs), 3, start=50)
    assert_close(tensors(others), tensors(trained(subject)[1]), 0.0)
    random_steps(twin, tensors(others), 3, start=50)
    assert_same(tensors(pairs), tensors(others))


@check
def a_pickle_trains_on(subject: Subject) -> None:
    """pickle.dumps(optimizer), for workers and old-style checkpoints, keeps everything the step needs."""
    optimizer, pairs = trained(subject)
    twin, others = pickle.loads(pickle.dumps((optimizer, pairs)))
    random_steps(optimizer, tensors(pairs), 3, start=50)
    random_steps(twin, tensors(others), 3, start=50)
    assert_same(tensors(pairs), tensors(others))
    twin.add_param_group({"params": [("late.weight", one())]})
    twin.load_state_dict(twin.state_dict())
    assert twin.step(lambda: 1.5) == 1.5 and "lr: " in repr(twin)


@check
def state_can_be_cleared(subject: Subject) -> None:
    """optimizer.state.clear(), or a fresh defaultdict, starts the moments anew: restarts and FSDP do that."""
    optimizer, pairs = trained(subject)
    optimizer.state.clear()
    for p, q in zip(tensors(pairs), tensors(named()), strict=True):
        p.data.copy_(q)
    random_steps(optimizer, tensors(pairs))
    assert_same(tensors(pairs), tensors(trained(subject)[1]))


@check
def state_replaced_by_hand_is_used(subject: Subject) -> None:
    """Tensors put into optimizer.state by a resharding tool are those the next step reads and writes."""
    optimizer, pairs = trained(subject)
    for state in optimizer.state.values():
        state.update({key: t.clone() for key, t in state.items()})
        state["exp_avg"].zero_()
    kept = [optimizer.state[p]["exp_avg"] for p in tensors(pairs)]
    give_gradients(tensors(pairs), 3)
    optimizer.step()
    for p, exp_avg in zip(tensors(pairs), kept, strict=True):
        assert optimizer.state[p]["exp_avg"] is exp_avg
        assert_close([exp_avg], [0.1 * p.grad], 1e-5)


@check
def weights_replaced_by_hand_are_used(subject: Subject) -> None:
    """model.load_state_dict and p.data = ... between steps: the next step starts from the new weights."""
    optimizer, pairs = trained(subject)
    other, others = trained(subject)
    for p, q in zip(tensors(pairs), tensors(others), strict=True):
        p.data = p.data + 1.0  # another address
        q.data.add_(1.0)
    random_steps(optimizer, tensors(pairs), 2, start=3)
    random_steps(other, tensors(others), 2, start=3)
    assert_same(tensors(pairs), tensors(others))


@check
def one_optimizer_per_parameter_is_the_same_training(subject: Subject) -> None:
    """Optimizer in backward: one per parameter, stepped by a post-accumulate hook that frees the gradient at once."""
    pairs, others = named(), named()
    together = subject.make(pairs, lr=LR)
    alone = {p: subject.make(pair(p, name), lr=LR) for name, p in others}

    def hook(p: torch.Tensor) -> None:
        alone[p].step()
        alone[p].zero_grad()

    for p in tensors(others):
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        sum((p * p).sum() for p in tensors(pairs)).backward()
        together.step()
        together.zero_grad()
        sum((p * p).sum() for p in tensors(others)).backward()
        assert all(p.grad is None for p in tensors(others))
    assert_same(tensors(pairs), tensors(others))
