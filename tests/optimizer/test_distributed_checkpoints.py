"""``torch.distributed.checkpoint`` in one process: through files and back, nested and flat, with and without names."""

from __future__ import annotations

import copy
import re

import pytest
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optimizer import AdamMini
from tests.optimizer.models import Llama, train
from tests.optimizer.states import by_name, equal, same_weights, trained


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_distributed_checkpoints_round_trip(flat: bool, named: bool, tmp_path) -> None:
    """Through files, into an optimizer without state: its weights stay, its lr is the checkpoint's."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build(model: nn.Module, lr: float) -> AdamMini:
        return AdamMini(model if named else model.parameters(), lr=lr, weight_decay=0.1)

    model = Llama()
    opt = build(model, 1e-2)
    train(model, opt)
    dcp.save({"optim": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=tmp_path)
    twin = Llama(seed=1)
    before = copy.deepcopy(twin)
    other = build(twin, 0.5)
    document = {"optim": get_optimizer_state_dict(twin, other, options=options)}
    same_weights(twin, before)
    assert other.param_groups[0]["lr"] == 0.5, "the zero lr of torch's initialisation was left behind"
    dcp.load(document, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, document["optim"], options=options)
    same_weights(twin, before)
    assert equal(other.state_dict(), opt.state_dict())
    assert all("rules" not in group for group in other.param_groups)


def test_distributed_checkpoints_load_into_other_groups() -> None:
    """torch hands over one saved group's options and names for all; the parameters' own keys say which is which."""
    model, opt = trained()
    document = get_optimizer_state_dict(model, opt)
    one = AdamMini(model.named_parameters())
    set_optimizer_state_dict(model, one, document)
    assert all(equal(state, by_name(opt)[name]) for name, state in by_name(one).items())


def test_distributed_checkpoints_of_another_partition_are_refused() -> None:
    model, opt = trained(rules="pytorch_default")
    document = get_optimizer_state_dict(model, opt)
    other = AdamMini(Llama())
    with pytest.raises(ValueError, match=re.escape("rules 'pytorch_default'")):
        other.load_state_dict(document)


def test_old_flat_documents_without_rules_load() -> None:
    """A live group must not have keys that older flat checkpoints lack: torch looks each of them up."""
    model, opt = trained()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    document = {key: value for key, value in get_optimizer_state_dict(model, opt, options=options).items()
                if not key.endswith(".rules")}  # fmt: skip
    twin = Llama(seed=1)
    other = AdamMini(twin)
    set_optimizer_state_dict(twin, other, document, options=options)
    assert equal(other.state_dict(), opt.state_dict())


def test_older_files_need_a_partial_load_and_get_one(tmp_path) -> None:
    """What the docs say of files without rules: torch's default planner wants every key, a partial one does not."""
    model, opt = trained()
    document = get_optimizer_state_dict(model, opt)
    for group in document["param_groups"]:
        del group["rules"]
    dcp.save({"optim": document}, checkpoint_id=tmp_path)
    twin = Llama(seed=1)
    other = AdamMini(twin)
    wanted = {"optim": get_optimizer_state_dict(twin, other)}
    with pytest.raises(dcp.api.CheckpointException, match="rules"):
        dcp.load(wanted, checkpoint_id=tmp_path)
    dcp.load(wanted, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(twin, other, wanted["optim"])
    assert equal(other.state_dict(), opt.state_dict())
