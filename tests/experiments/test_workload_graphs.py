"""The graph of WordNet's nouns and ogbn-arxiv: files are read exactly or refused; baselines; the loss of nodes."""

from __future__ import annotations

import dataclasses
import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.configs import TrainConfig, of_workloads
from experiments.data import arxiv, wordnet
from experiments.train import fetch
from experiments.workloads import graph_baselines, graphs
from experiments.workloads.graphs import NodeClassification, NodeClassifier

LICENCE = "  1 This software and database is being provided to you\n"
LINES = (
    "00000100 03 n 02 thing 0 whole_thing 1 003 ~ 00000200 n 0000 + 00000300 v 0101 ~i 00000300 n 0000 | a red thing  ",
    '00000200 05 n 01 dog 0 002 @ 00000100 n 0000 #m 00000200 n 0000 | a dog; "the dog\'s red dog"  ',
    "00000300 28 n 01 day 0 000 | the | day  ",
)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small ``data.noun`` in place of the package's, pinned."""
    file = tmp_path / "data.noun"
    file.write_text(LICENCE + "".join(line + "\n" for line in LINES), encoding="utf-8")
    monkeypatch.setattr(wordnet, "INSTALLED", tmp_path)
    monkeypatch.setattr(wordnet, "SHA256", wordnet.hashlib.sha256(file.read_bytes()).hexdigest())
    wordnet.wordnet.cache_clear()
    yield file
    wordnet.wordnet.cache_clear()


def small_graph(nodes: int = 60) -> wordnet.Graph:
    """A ring of three arcs with a label each; the features say the label of every second node."""
    labels = np.arange(nodes) * 3 // nodes
    features = np.eye(3, dtype=np.float32)[labels]
    features[::2] = 0
    order = np.random.Generator(np.random.Philox(0)).permutation(nodes)
    parts = {"train": order[:30], "validation": order[30:45], "test": order[45:]}
    return wordnet.Graph(
        features, wordnet.both_ways((i, (i + 1) % nodes) for i in range(nodes)), labels, parts, 3, "f" * 64
    )


# ------------------------------------------------------------------------------------------------- reading WordNet


def test_a_line_is_read() -> None:
    assert wordnet.parsed(LINES[0]) == wordnet.Synset(100, 0, "a red thing", (200, 300))  # the verb is left out
    assert wordnet.parsed(LINES[2]) == wordnet.Synset(300, 25, "the | day", ())


@pytest.mark.parametrize(
    "line",
    [
        LINES[0].replace(" n 02", " v 02"),
        LINES[0].replace("00 03", "00 02"),
        LINES[0].replace(" | ", " "),
        LINES[0].replace("003 ~", "009 ~"),
        "",
    ],
)
def test_a_line_that_is_no_noun_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"is no (noun with|line of data\.noun)"):
        wordnet.parsed(line)


def test_edges_go_both_ways_without_loops() -> None:
    synsets = [wordnet.parsed(line) for line in LINES]
    assert wordnet.edges_of(synsets).tolist() == [[1, 2, 0, 0], [0, 0, 1, 2]]
    with pytest.raises(ValueError, match="offset 200"):
        wordnet.edges_of(synsets[:1])


def test_features_are_tf_idf_of_the_most_frequent_words() -> None:
    found = wordnet.bag_of_words(["red red dog", "a Red!", "dog", "sky"], 2)  # dog and red occur in two glosses each
    assert found == pytest.approx(np.array([[1, 2], [0, 5**0.5], [5**0.5, 0], [0, 0]]) / 5**0.5)
    weighted = wordnet.bag_of_words(["x y", "x", "x z", "w"], 2)[0]  # the second of w, y and z, each in one gloss
    assert weighted.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="words=5 must be at most 4"):
        wordnet.bag_of_words(["red dog", "a sky"], 5)


def test_equal_glosses_are_in_one_part_and_parts_cover_all() -> None:
    glosses = [f"gloss {i % 500}" for i in range(1_000)]
    parts = wordnet.split(glosses)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1_000))
    assert all(np.array_equal(nodes[: len(nodes) // 2] + 500, nodes[len(nodes) // 2 :]) for nodes in parts.values())
    shares = [len(parts[part]) / 1_000 for part in wordnet.PARTS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.05)
    with pytest.raises(ValueError, match=r"parts \['validation', 'test'\] of 2 nodes are empty"):
        wordnet.split(["gloss 1", "gloss 4"])


def test_the_file_is_pinned(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "split", lambda glosses: {"train": np.arange(len(glosses))})
    graph = wordnet.wordnet(3)
    assert graph.labels.tolist() == [0, 2, 25] and graph.features.shape == (3, 3) and graph.classes == 26
    wordnet.wordnet.cache_clear()
    installed.write_text(installed.read_text() + "\n")
    with pytest.raises(ValueError, match="is pinned; install version"):
        wordnet.wordnet(3)
    installed.unlink()
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        wordnet.wordnet(3)


# ------------------------------------------------------------------------------------------------- ogbn-arxiv


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark's files with five nodes."""
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(arxiv, "NODES", 5)
    monkeypatch.setattr(arxiv, "FEATURES", 2)
    files = {
        "raw/edge": "0,1\n1,0\n3,4\n", "raw/node-feat": "1,2\n" * 5, "raw/node-label": "0\n39\n1\n2\n3\n",
        "split/time/train": "2\n0\n", "split/time/valid": "1\n", "split/time/test": "3\n4\n",
    }  # fmt: skip
    for name, content in files.items():
        path = arxiv.folder() / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()))
    arxiv.ogbn_arxiv.cache_clear()
    yield arxiv.folder()
    arxiv.ogbn_arxiv.cache_clear()


def test_arxiv_is_read_with_citations_in_both_directions(unpacked: Path) -> None:
    graph = arxiv.ogbn_arxiv()
    assert graph.edges.tolist() == [[1, 0, 4, 3], [0, 1, 3, 4]]
    assert graph.labels.tolist() == [0, 39, 1, 2, 3] and graph.features.shape == (5, 2)
    assert {part: nodes.tolist() for part, nodes in graph.parts.items()} == {
        "train": [0, 2], "validation": [1], "test": [3, 4],
    }  # fmt: skip


def test_arxiv_is_refused_where_it_is_missing_or_damaged(unpacked: Path) -> None:
    (unpacked / "raw/node-label.csv.gz").write_bytes(gzip.compress(b"0\n" * 4))
    with pytest.raises(ValueError, match=r"labels of shape \(4, 1\), not of 5 nodes"):
        arxiv.ogbn_arxiv()
    (unpacked / "raw/edge.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"on a machine with a connection, get http"):
        fetch(of_workloads()["gcn-ogbn-arxiv"])


# ------------------------------------------------------------------------------------------------- configs and loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "sage"}, "network='sage' is unknown"),
        ({"layers": 0}, "layers=0 must be"),
        ({"width": 1.5}, "width=1.5 must be a whole number"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"loss_offset": -1.0}, "loss_offset=-1.0 must be"),
        ({"heads": 2}, "heads=2 must be 1"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: {message}"):
        TrainConfig("graphs", NodeClassifier(**change), data="wordnet-nouns", seq_len=1)


def test_unknown_graphs_and_other_features_are_refused(unpacked: Path) -> None:
    with pytest.raises(ValueError, match="data='cora' is no graph"):
        graphs.graph_of("cora", 2)
    with pytest.raises(ValueError, match="features=3 must be 2"):
        graphs.graph_of("ogbn-arxiv", 3)


class Fixed(nn.Module):
    """Logits that are a parameter, in place of a graph network."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(3.0 * nodes).reshape(nodes, 3) % 7)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        return self.logits


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> NodeClassification:
    monkeypatch.setattr(graphs, "graph_of", lambda data, features: small_graph())
    monkeypatch.setattr(graphs, "build", lambda kind, classes, seed: Fixed(60))
    kind = NodeClassifier("gat", loss_offset=0.5)
    return kind.task(TrainConfig("graphs", kind, batch=14, seq_len=1, seed=3), torch.device("cpu"))


def test_batches_are_different_training_nodes_in_every_step_of_an_epoch(task: NodeClassification) -> None:
    (first,), (second,) = task.batch(0), task.batch(1)
    train = set(task.parts["train"].tolist())
    assert len({*first.tolist(), *second.tolist()} & train) == 28 and torch.equal(first, task.batch(0)[0])
    task.config = dataclasses.replace(task.config, seed=4)
    assert not torch.equal(first, task.batch(0)[0])


def test_the_offset_limits_the_loss_in_training_alone(task: NodeClassification) -> None:
    (nodes,) = task.batch(0)
    plain = -task.model.logits.log_softmax(1)[nodes, task.labels[nodes]]
    assert task.loss(task.model, (nodes,)).item() == pytest.approx(((0.5 + plain).log() - math.log(0.5)).mean().item())
    numbers, held_out = task.evaluate(casting=torch.no_grad), task.parts["validation"]
    logs = task.model.logits.log_softmax(1)[held_out]
    assert numbers["val_loss"] == pytest.approx(-logs[range(15), task.labels[held_out]].mean().item())
    assert list(numbers) == ["val_loss", "accuracy", "test_loss", "test_accuracy"] and task.model.training


def test_full_sizes_are_those_of_the_sources() -> None:
    gcn, gat = (of_workloads()[f"{name}-ogbn-arxiv"] for name in ("gcn", "gat"))
    assert (gcn.lr, gcn.steps, gcn.model.width, gcn.model.layers, gcn.model.dropout) == (5e-3, 1_000, 256, 3, 0.5)
    assert gcn.lr * gcn.lr_end == pytest.approx(1e-3) and gcn.warmup * gcn.steps == gat.warmup * gat.steps == 50
    assert (gat.lr, gat.steps, gat.model.width, gat.model.heads, gat.model.dropout) == (2e-3, 2_000, 250, 3, 0.75)
    assert gcn.batch == gat.batch == 90_941 // 2


# ------------------------------------------------------------------------------------------------- baselines


def test_baselines_use_what_they_may() -> None:
    graph = small_graph()
    counts = np.bincount(graph.labels[graph.parts["train"]])
    validation = graph.labels[graph.parts["validation"]]
    assert graph_baselines.majority(graph)["accuracy"] == (validation == counts.argmax()).mean()
    fitted, spread = graph_baselines.logistic_regression(graph, 1e-6), graph_baselines.propagation(graph)
    told = (graph.parts["validation"] % 2 == 1).mean()  # the other nodes have no features, and one guess
    assert told <= fitted["accuracy"] < 1 and spread["accuracy"] > 0.9
    without = dataclasses.replace(graph, features=np.zeros_like(graph.features))
    assert graph_baselines.propagation(without) == spread
    assert graph_baselines.logistic_regression(without, 1e-6)["accuracy"] == graph_baselines.majority(graph)["accuracy"]
