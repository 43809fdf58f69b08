"""What a graph network has to beat, on the same split: ``python -m experiments.workloads.graph_baselines``.

majority             the shares of the labels among the training nodes, for every node
logistic regression  a linear classifier of the features, without edges
propagation          labels of training nodes, spread along the edges, without features (Zhou et al. 2003)
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from experiments.commandline import refusals
from experiments.data.wordnet import Graph

from .graphs import graph_of, judged

PENALTIES = (1e-5, 1e-6, 1e-7)
"""Weight penalties of the logistic regression; the best one on the validation nodes is taken."""
SPREAD, ROUNDS = 0.9, 30


def majority(graph: Graph) -> dict[str, float]:
    """Judge the shares of the training labels. The smoothing of one node keeps a label without nodes finite."""
    counts = np.bincount(graph.labels[graph.parts["train"]], minlength=graph.classes) + 1.0
    return _of(graph, torch.from_numpy(np.log(counts)).expand(len(graph.labels), -1))


def logistic_regression(graph: Graph, penalty: float, iterations: int = 200) -> dict[str, float]:
    """Fit multinomial logistic regression by L-BFGS on the training nodes, and judge it.

    Args:
        graph: the graph, whose edges are not used.
        penalty: factor of the weights' sum of squares beside the mean cross entropy.
        iterations: most iterations.
    """
    train = torch.from_numpy(graph.parts["train"])
    features, labels = torch.from_numpy(graph.features), torch.from_numpy(graph.labels)[train]
    inputs = features[train]
    weight = torch.zeros(graph.classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(graph.classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return _of(graph, F.linear(features, weight, bias).detach())


def propagation(graph: Graph) -> dict[str, float]:
    """Spread the training labels along the edges, normalised by the roots of both degrees, and judge the accuracy."""
    nodes, train = len(graph.labels), graph.parts["train"]
    source, target = graph.edges
    degree = np.bincount(target, minlength=nodes).clip(1)
    weights = (degree[source] * degree[target]) ** -0.5
    spreading = scipy.sparse.csr_matrix((weights, (target, source)), shape=(nodes, nodes))
    known = np.zeros((nodes, graph.classes))
    known[train, graph.labels[train]] = 1
    found = known
    for _ in range(ROUNDS):
        found = SPREAD * (spreading @ found) + (1 - SPREAD) * known
    numbers = _of(graph, torch.from_numpy(found))
    return {name: value for name, value in numbers.items() if "accuracy" in name}  # the scores are no probabilities


def _of(graph: Graph, logits: Tensor) -> dict[str, float]:
    return judged(logits, torch.from_numpy(graph.labels), graph.parts)


def main(data: str = "wordnet-nouns", features: int = 512) -> None:
    """Print the baselines of a graph.

    Args:
        data: name of the graph.
        features: its number of features.
    """
    with refusals(ValueError, OSError):
        graph = graph_of(data, features)
    fits = {f"logistic regression, penalty {penalty:g}": logistic_regression(graph, penalty) for penalty in PENALTIES}
    best = min(fits, key=lambda name: fits[name]["val_loss"])
    for name, numbers in {"majority": majority(graph), best: fits[best], "propagation": propagation(graph)}.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))


if __name__ == "__main__":
    tyro.cli(main)
