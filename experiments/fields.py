"""Fields that configs gained after the first results were stored, so that older runs keep their hashes.

A config's hash is that of its document, and names the run's folder. A new field would change every document. So a field
that is declared with ``metadata=ADDED`` occurs in a document only where it differs from its default, and a document
without it means the default. That is the whole rule: to add a field to a config or to a model's sizes, write
``name: type = field(default=..., metadata=ADDED)``, with the default that older runs had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

ADDED: Mapping[str, Any] = {"added": True}
"""Metadata of a field that is in a document only if it differs from its default."""


def document_of(config: Any) -> dict[str, Any]:
    """Return a dataclass's fields as a dict, without the added ones that have their default."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default or not field.metadata.get("added")
    }


def require_keys(what: str, document: Mapping[str, Any], kind: type, *, more: tuple[str, ...] = ()) -> None:
    """Check the keys of a document from a file.

    Args:
        what: name of the document, for the message.
        document: the document.
        kind: the dataclass that it describes.
        more: further keys that it must have.

    Raises:
        ValueError: a key is unknown, or a key that is no added field is missing.
    """
    fields = dataclasses.fields(kind)
    known = {*more, *(field.name for field in fields)}
    needed = known - {field.name for field in fields if field.metadata.get("added")}
    unknown, missing = sorted(document.keys() - known), sorted(needed - document.keys())
    if unknown or missing:
        raise ValueError(f"the {what} has the unknown keys {unknown} and lacks {missing}; write it with to_dict")
