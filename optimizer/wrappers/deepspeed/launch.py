"""DeepSpeed with AdamMini as its optimizer.

``deepspeed.initialize(model=model, optimizer=AdamMini(model), config=config)`` works if the config has
``"zero_allow_untested_optimizer": true`` and, with an offloaded optimizer, ``"zero_force_ds_cpu_optimizer": false``.
``initialize`` in this module sets both, and builds the optimizer if none is passed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...adam_mini import AdamMini
from ...partition.documents import parse_json

_NAMES = ("adammini", "adam_mini", "adam-mini")


def initialize(
    model: nn.Module,
    optimizer: Any = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **more: Any,
) -> tuple[Any, Any, Any, Any]:
    """Call ``deepspeed.initialize`` with AdamMini.

    Args:
        model: any module; under ZeRO-3 also one built inside ``deepspeed.zero.Init``.
        optimizer: an AdamMini, or a callable that builds one from parameters. None builds ``AdamMini(model, **params)``
            with the ``params`` of the config's ``optimizer`` section, whose ``type`` must then be "AdamMini".
        config: DeepSpeed's config, as a dictionary or the path of a JSON file; not changed.
        **more: further arguments of ``deepspeed.initialize``.

    Returns:
        The engine, optimizer, data loader and scheduler, as ``deepspeed.initialize`` returns them.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: the config asks for another optimizer, or for DeepSpeed's own optimizer on the host.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("optimizer.integrations.deepspeed needs DeepSpeed: pip install deepspeed") from error
    settings = config_for_adam_mini(config)
    section = settings.pop("optimizer", None)
    if optimizer is None:
        optimizer = AdamMini(model, **_options(section))
    elif section is not None:
        raise ValueError(
            f"config has an optimizer section ({section.get('type')!r}), and the argument optimizer is set as well; "
            "leave one of them out"
        )
    result: tuple[Any, Any, Any, Any] = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, **more)
    return result


def config_for_adam_mini(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return a copy of a DeepSpeed config that allows ZeRO with an optimizer that is not DeepSpeed's own.

    Args:
        config: DeepSpeed's config, as a dictionary or the path of a JSON file; not changed.

    Raises:
        ValueError: there is no config, or it requires DeepSpeed's own optimizer on the host.
    """
    if config is None:
        raise ValueError("argument config=None; give DeepSpeed's config as a dictionary or the path of a JSON file")
    settings = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else _read(Path(config))
    settings.setdefault("zero_allow_untested_optimizer", True)
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and settings.setdefault("zero_force_ds_cpu_optimizer", False):
        raise ValueError(
            'config has "zero_force_ds_cpu_optimizer": true, with which DeepSpeed accepts only its own '
            "DeepSpeedCPUAdam, which stores a second moment per element; set it to false or leave it out"
        )
    return settings


def _read(path: Path) -> dict[str, Any]:
    """Read a config file. Duplicate keys are refused, as in DeepSpeed."""
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {path} is not valid JSON ({error}); give DeepSpeed's config") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path} holds a JSON {type(settings).__name__}, not an object")
    return settings


def _options(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return AdamMini's arguments from the config's optimizer section, without which there are none."""
    if section is None:
        return {}
    if str(section.get("type", "")).lower() not in _NAMES:
        raise ValueError(
            f"config's optimizer type is {section.get('type')!r}; call deepspeed.initialize for that, or set it to "
            '"AdamMini"'
        )
    options = dict(section.get("params", {}))
    return {**options, "betas": tuple(options["betas"])} if "betas" in options else options
