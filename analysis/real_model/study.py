"""The stored results of the study of a real model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.documents import damaged, read_object

PARTITIONS = ("element", "column", "row", "head", "tensor")
CONTROL = "random"
HEAD_ROLES = ("QUERY", "KEY", "VALUE", "ATTENTION_OUT")
WHOLE = "whole"
_MEND = "run `make real-model` again"


@dataclass(frozen=True)
class Study:
    """The results: name of a task -> its document, for tasks with a sample.

    Attributes:
        documents: the documents.
    """

    documents: Mapping[str, dict[str, Any]]

    def of(self, kind: str, **task: Any) -> list[dict[str, Any]]:
        """Return the documents of a kind whose task has the given entries."""
        wanted = {"kind": kind, **task}
        return [d for d in self.documents.values() if wanted.items() <= d["task"].items()]

    def one(self, kind: str, **task: Any) -> dict[str, Any] | None:
        """Return the only document that ``of`` finds, None if there is none."""
        found = self.of(kind, **task)
        return found[0] if found else None

    @property
    def hours(self) -> float:
        """Time of all samples, in hours of one thread."""
        return sum(sum(d["seconds"]) for d in self.documents.values()) / 3600


def load(folder: Path) -> Study:
    """Read the results.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a file is damaged.
    """
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = read_object(path, _MEND)
        for key, kind in (("task", dict), ("facts", dict), ("samples", list), ("seconds", list)):
            if not isinstance(document.get(key), kind):
                raise damaged(path, f"it has no {key}", _MEND)
        if document["samples"]:
            documents[path.stem] = document
    if not documents:
        raise FileNotFoundError(f"no results in {folder}; run `make real-model` first")
    return Study(documents)
