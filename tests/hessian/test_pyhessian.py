"""Two implementations that share no code agree: top eigenvalue, trace and spectral moments, over ragged batches."""

from __future__ import annotations

import warnings

import torch

from experiments.models import lm_loss
from hessian import HessianOperator, dense, slq
from hessian.adapters.pyhessian import pyhessian_answer
from tests.hessian.subjects import batches_for, mlp


def test_pyhessian_agrees() -> None:
    model, removed = mlp(), torch.eig
    batches = batches_for(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls backward(create_graph=True)
        theirs = pyhessian_answer(model, lm_loss, batches, top=1, steps=12, probes=12)
    assert all(p.grad is None for p in model.parameters()) and torch.eig is removed
    assert torch.get_default_dtype() is torch.float32
    operator = HessianOperator(model, lm_loss, None, batches)
    exact = torch.linalg.eigvalsh(dense(operator))
    largest = exact[exact.abs().argmax()]
    torch.testing.assert_close(theirs.eigenvalues[0], largest, rtol=1e-4, atol=0)
    assert abs(theirs.trace - float(exact.sum())) < 4 * theirs.trace_stderr
    ours = slq(operator, steps=12, probes=12)
    for k in (1, 2):
        each = (theirs.weights * theirs.nodes**k).sum(1)
        mean, stderr = ours.moment(k)
        assert abs(float(each.mean()) - mean) < 4 * (stderr**2 + float(each.var()) / len(each)) ** 0.5
