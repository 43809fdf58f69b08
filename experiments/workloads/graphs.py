"""Node classification: GCN and GAT by PyTorch Geometric on the graph of WordNet's nouns, over the whole graph at once.

It is a public graph of words, not Cora or another citation graph. A step predicts the categories of a random half of
the training nodes from the features and edges of all nodes, as DGL's example on ogbn-arxiv does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import epoch_rows
from experiments.data.arxiv import ogbn_arxiv
from experiments.data.wordnet import Graph, wordnet

from .libraries import library
from .workload import Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

Network = Literal["gcn", "gat"]


@dataclass(frozen=True)
class NodeClassifier:
    """A graph network: convolutions, with batch normalisation, ReLU and dropout between them.

    Attributes:
        network: ``gcn`` (Kipf and Welling, arXiv 1609.02907) or ``gat`` (Velickovic et al., arXiv 1710.10903).
        features: features of a node; for WordNet, the number of words.
        width: channels of a hidden layer, and in a GAT of each of its heads.
        layers: number of convolutions.
        heads: attention heads of a GAT's hidden layers; its last layer has one.
        dropout: share of hidden channels that are dropped.
        input_dropout: share of features that are dropped.
        linear: whether each convolution has a linear layer beside it.
        loss_offset: if not 0, a node's loss l is log(offset + l) - log(offset), which limits the pull of nodes that are
            far off. Held-out losses are plain cross entropies.
    """

    network: Network = "gcn"
    features: int = 512
    width: int = 64
    layers: int = 3
    heads: int = 1
    dropout: float = 0.5
    input_dropout: float = 0.0
    linear: bool = True
    loss_offset: float = 0.0

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a word is unknown, a number is out of range, or a GCN has heads.
        """
        if self.network not in get_args(Network):
            raise ValueError(f"network={self.network!r} is unknown; choose from {get_args(Network)}")
        for name in ("features", "width", "layers", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number, at least 1")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.loss_offset < math.inf:
            raise ValueError(f"loss_offset={self.loss_offset} must be a finite number, at least 0")
        if self.network == "gcn" and self.heads != 1:
            raise ValueError(f"heads={self.heads} must be 1 for network='gcn', which has no attention")

    def fetch(self, config: TrainConfig) -> None:
        """Check that PyTorch Geometric and the graph are there.

        Raises:
            FileNotFoundError: the graph's files are not on this machine.
            RuntimeError: PyTorch Geometric is not installed.
            ValueError: the data is unknown, a file is damaged, or the graph has another number of features.
        """
        graph_of(config.data, self.features)
        library("torch_geometric.nn", "a graph network")

    def task(self, config: TrainConfig, device: torch.device) -> NodeClassification:
        """Return the task that trains it."""
        return NodeClassification(config, self, device)


def graph_of(data: str, features: int) -> Graph:
    """Load a graph by its name: ``wordnet-nouns`` or ``ogbn-arxiv``.

    Raises:
        FileNotFoundError: its files are not on this machine.
        ValueError: the name is unknown, a file is damaged, or it has another number of features.
    """
    if data not in ("wordnet-nouns", "ogbn-arxiv"):
        raise ValueError(f"data={data!r} is no graph; use 'wordnet-nouns' or 'ogbn-arxiv'")
    graph = wordnet(features) if data == "wordnet-nouns" else ogbn_arxiv()
    if graph.features.shape[1] != features:
        raise ValueError(f"features={features} must be {graph.features.shape[1]}, the features of data={data!r}")
    return graph


class GraphNetwork(nn.Module):
    """A GCN or GAT, laid out like those of DGL's example on ogbn-arxiv.

    A convolution that batch normalisation follows has no bias.
    """

    def __init__(self, kind: NodeClassifier, classes: int) -> None:
        super().__init__()
        layers = library("torch_geometric.nn", "a graph network")
        self.dropout, self.input_dropout = kind.dropout, kind.input_dropout
        self.convs, self.linears, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = kind.features
        for i in range(kind.layers):
            last = i == kind.layers - 1
            heads = 1 if last else kind.heads
            width = classes if last else kind.width
            if kind.network == "gcn":
                self.convs.append(layers.GCNConv(inputs, width, cached=True, bias=last))
                if kind.linear:
                    self.linears.append(nn.Linear(inputs, width, bias=False))
            else:
                self.convs.append(layers.GATConv(inputs, width, heads, residual=kind.linear, bias=last))
            inputs = heads * width
            if not last:
                self.norms.append(nn.BatchNorm1d(inputs))

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """Map features [nodes, features] and edges to logits [nodes, classes]."""
        x = F.dropout(features, self.input_dropout, self.training)
        for i, conv in enumerate(self.convs):
            x = conv(x, edges) + self.linears[i](x) if len(self.linears) else conv(x, edges)
            if i < len(self.norms):
                x = F.dropout(F.relu(self.norms[i](x)), self.dropout, self.training)
        return x


def build(kind: NodeClassifier, classes: int, seed: int) -> GraphNetwork:
    """Build a graph network; its weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GraphNetwork(kind, classes)


class NodeClassification:
    """Cross entropy on training nodes, and cross entropy and accuracy on all nodes of the validation and test parts.

    A batch holds indices of nodes. Every process computes the whole graph for its share of them.

    Args:
        config: the run.
        kind: the graph network.
        device: where the graph is kept.
    """

    def __init__(self, config: TrainConfig, kind: NodeClassifier, device: torch.device) -> None:
        graph = graph_of(config.data, kind.features)
        self.config, self.offset = config, kind.loss_offset
        self.model = build(kind, graph.classes, config.seed)
        self.fingerprint = graph.fingerprint
        self.parts = graph.parts
        self.features = torch.from_numpy(graph.features).to(device)
        self.labels = torch.from_numpy(graph.labels).to(device)
        edges = torch.from_numpy(graph.edges)
        self.edges = (adjacency(edges, len(graph.labels)) if kind.network == "gcn" else edges).to(device)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return (indices of training nodes, int64 [batch]) of a step."""
        nodes = self.parts["train"]
        rows, _ = epoch_rows(len(nodes), self.config.seed, step, self.config.batch)
        return (torch.from_numpy(nodes[rows]),)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean loss of nodes in nats."""
        (nodes,) = batch
        logits = module(self.features, self.edges)[nodes].float()
        losses = F.cross_entropy(logits, self.labels[nodes], reduction="none")
        return (torch.log(self.offset + losses) - math.log(self.offset) if self.offset else losses).mean()

    @torch.no_grad()
    def evaluate(self, *, rows: int = 0, casting: Casting) -> dict[str, float]:
        """Return cross entropy in nats and accuracy on the validation nodes, and on the test nodes.

        Args:
            rows: not used; one forward pass has all nodes.
            casting: returns the context of a forward pass.
        """
        self.model.eval()
        with casting():
            logits = self.model(self.features, self.edges).float()
        self.model.train()
        return judged(logits, self.labels, self.parts)


def judged(logits: Tensor, labels: Tensor, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return cross entropy in nats and accuracy on the validation nodes, and on the test nodes.

    Args:
        logits: [nodes, classes].
        labels: int64 [nodes].
        parts: part -> indices of its nodes.
    """
    numbers = {}
    for part, loss, accuracy in (("validation", "val_loss", "accuracy"), ("test", "test_loss", "test_accuracy")):
        found, wanted = logits[parts[part]], labels[parts[part]]
        numbers[loss] = F.cross_entropy(found, wanted).item()
        numbers[accuracy] = (found.argmax(1) == wanted).double().mean().item()
    return numbers


def adjacency(edges: Tensor, nodes: int) -> Tensor:
    """Return edges as a sparse matrix in rows, [nodes, nodes], with which a GCN takes half of the time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # torch says once that such tensors are in beta, and unchecked
        return library("torch_geometric.utils", "a graph network").to_torch_csr_tensor(edges, size=(nodes, nodes))


_RUN: dict[str, Any] = {
    "data": "wordnet-nouns",
    "batch": 24_448,
    "seq_len": 1,
    "steps": 150,
    "eval_every": 25,
    "eval_batches": 1,
    "checkpoint_every": 50,
    "weight_decay": 0.0,
    "clip": 0.0,
}
_SMOKE: dict[str, Any] = {"steps": 4, "eval_every": 2, "checkpoint_every": 2}
_RATES = (3e-3, 1e-2, 3e-2)
_TINY = {"features": 32, "width": 8, "layers": 2}

# The paper names GCN and GAT on ogbn-arxiv. Their sizes and numbers are the defaults of DGL's example, which is the
# source of both (github.com/dmlc/dgl, examples/pytorch/ogb/ogbn-arxiv, gcn.py, gat.py and models.py): three layers, no
# weight decay, half of the 90,941 training nodes per step, 50 steps of warm-up, the loss's offset. Ours: AdamW for the
# GAT too, whose example has RMSprop; and in place of halving the GCN's rate on plateaus, but not below 1e-3, a linear
# decay to 1e-3. The GAT's rate is constant; lr_end must be below 1.
_ARXIV: dict[str, Any] = {"data": "ogbn-arxiv", "batch": 45_470, "beta2": 0.999, "eval_every": 20}
_GCN_ARXIV = NodeClassifier(features=128, width=256, input_dropout=0.1, linear=False, loss_offset=0.5)
_GAT_ARXIV = NodeClassifier("gat", 128, 250, heads=3, dropout=0.75, input_dropout=0.1, loss_offset=1 - math.log(2))
GCN = Workload(
    {**_RUN, "model": NodeClassifier()},
    {**_SMOKE, "model": NodeClassifier(**_TINY)},
    _RATES,
    full={
        "ogbn-arxiv": {
            **_ARXIV, "model": _GCN_ARXIV, "lr": 5e-3, "lr_end": 0.2, "steps": 1_000, "warmup": 50 / 1_000,
        }
    },
)  # fmt: skip
GAT = Workload(
    {**_RUN, "model": NodeClassifier("gat", width=16, heads=4), "steps": 100},
    {**_SMOKE, "model": NodeClassifier("gat", heads=2, **_TINY)},
    _RATES,
    full={
        "ogbn-arxiv": {
            **_ARXIV, "model": _GAT_ARXIV, "lr": 2e-3, "lr_end": 0.999, "steps": 2_000, "warmup": 50 / 2_000,
        }
    },
)  # fmt: skip
