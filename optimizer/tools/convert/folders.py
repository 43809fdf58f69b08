"""Read folders of torch.distributed.checkpoint into mapped files.

Every tensor of the folder is written whole to a scratch file of its own, however many ranks wrote the folder. The files
are mapped into memory, so that the operating system can write their pages back and free them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Return whether the path is a folder that ``torch.distributed.checkpoint.save`` finished."""
    return Path(source, ".metadata").is_file()


def mapped_folder(source: str | os.PathLike[str], scratch: Path) -> Any:
    """Return the document that the folder contains. Its tensors are whole and mapped from files under ``scratch``.

    Optimizer state that was flattened by name (``StateDictOptions(flatten_optimizer_state_dict=True)``, torchtitan) is
    nested again, with one parameter group for each distinct set of options.

    Raises:
        ValueError: the folder is damaged.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        metadata = dcp.FileSystemReader(source).read_metadata()
    except Exception as error:  # Unpickling a damaged file can raise any exception.
        raise ValueError(
            f"{os.fspath(source)!r} has a .metadata that cannot be read ({error}); use an earlier checkpoint"
        ) from error
    _require_files(Path(source), metadata)
    flat: dict[str, Any] = {}
    for number, (key, stored) in enumerate(metadata.state_dict_metadata.items()):
        is_tensor = hasattr(stored, "properties")
        flat[key] = _mapped(scratch / str(number), stored) if is_tensor else 0
    try:
        dcp.load(flat, storage_reader=dcp.FileSystemReader(source), no_dist=True)
    except CheckpointException as error:  # A BaseException, which ``except Exception`` misses.
        failure = next(iter(error.failures.values()))[0]
        why = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise ValueError(f"{os.fspath(source)!r} cannot be read ({why}); use an earlier checkpoint") from error
    paths = metadata.planner_data or {}
    document: dict[Any, Any] = {}
    for key, value in flat.items():
        _put(document, paths.get(key, (key,)), value)
    return _nested(document)


def _require_files(folder: Path, metadata: Any) -> None:
    """Check that every file that the metadata names exists and is long enough.

    Raises:
        ValueError: a file is missing or truncated. The message contains its path.
    """
    for stored in (metadata.storage_data or {}).values():
        path, least_size = folder / stored.relative_path, stored.offset + stored.length
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing, though .metadata names it; copy the whole folder again")
        if path.stat().st_size < least_size:
            raise ValueError(
                f"{str(path)!r} is cut: {path.stat().st_size} bytes, at least {least_size} are needed; copy it again, "
                "or use an earlier checkpoint"
            )


def _mapped(path: Path, stored: Any) -> Tensor:
    """Return a tensor of the stored shape and dtype that is mapped from a new file."""
    dtype, size = stored.properties.dtype, tuple(stored.size)
    if prod(size) == 0:
        return torch.empty(size, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=prod(size), dtype=dtype).view(size)


def _put(document: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    """Store a value in nested dictionaries, which are created as needed."""
    for key in path[:-1]:
        document = document.setdefault(key, {})
    document[path[-1]] = value


def _nested(value: Any) -> Any:
    """Turn dictionaries with the keys 0, 1, ... into lists, and flattened optimizer state into a nested state dict."""
    if not isinstance(value, Mapping):
        return value
    keys = list(value)
    if keys and all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in keys):
        return _by_parameter(value)
    inner = {key: _nested(child) for key, child in value.items()}
    if keys and all(isinstance(key, int) for key in keys) and sorted(keys) == list(range(len(keys))):
        return [inner[k] for k in range(len(keys))]
    return inner


def _by_parameter(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn "state.NAME.exp_avg" and "param_groups.NAME.lr" into a state dict with one group per set of options."""
    states: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = key.partition(".")
        name, _, leaf = rest.rpartition(".")
        (states if kind == "state" else options).setdefault(name, {})[leaf] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, group_options in options.items():
        key = json.dumps({k: str(v) for k, v in sorted(group_options.items())})
        groups.setdefault(key, {**group_options, "params": []})["params"].append(name)
    return {"state": states, "param_groups": list(groups.values())}
