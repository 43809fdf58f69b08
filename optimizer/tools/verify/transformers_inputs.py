"""Guess inputs of transformers models from their configurations: text, images, image patches and sound."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import LENGTH, Forward


def guesses(model: nn.Module, generator: torch.Generator) -> Iterator[Forward]:
    """Yield forward passes of the model, then of the models inside it, for example a vision tower."""
    yield from _forwards(model, "", generator)
    seen = {type(model)}
    for path, module in model.named_modules():
        if path and hasattr(module, "main_input_name") and type(module) not in seen:
            seen.add(type(module))
            yield from _forwards(module, path, generator)


def _forwards(module: nn.Module, path: str, generator: torch.Generator) -> Iterator[Forward]:
    """Yield forward passes of one transformers model, chosen by the name of its main input."""
    name = str(getattr(module, "main_input_name", "input_ids"))
    config: Any = module.config
    common: dict[str, Any] = {"use_cache": False} if _accepts(module, "use_cache") else {}
    where = path or type(module).__name__
    if _accepts(module, "grid_thw", by_name=True):
        yield _patches(module, where, config, generator)
    elif name == "input_ids":
        ids = _ids(module, generator)
        if bool(getattr(config, "is_encoder_decoder", False)) and _accepts(module, "decoder_input_ids"):
            common["decoder_input_ids"] = ids
        yield Forward(f"{where}(input_ids {LENGTH})", module, (), {"input_ids": ids, **common})
    elif name == "pixel_values":
        yield from _images(module, where, config, common, generator)
    elif name in ("input_features", "input_values", "audio_values"):
        yield from _sound(module, where, name, config, common, generator)


def _accepts(module: nn.Module, argument: str, *, by_name: bool = False) -> bool:
    """Return whether ``forward`` accepts an argument by its name or, unless ``by_name``, through ``**kwargs``."""
    parameters = inspect.signature(type(module).forward).parameters
    return argument in parameters or (not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def _get(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of the named values that the configuration or one of its sub-configurations has."""
    for source in (
        config,
        getattr(config, "vision_config", None),
        getattr(config, "audio_config", None),
        getattr(config, "encoder", None),
    ):
        for name in names:
            if source is not None and getattr(source, name, None) is not None:
                return getattr(source, name)
    return default


def _ids(module: nn.Module, generator: torch.Generator) -> Tensor:
    """Return random token ids in [5, 60), or less for a small vocabulary. The first ids are often special tokens."""
    config: Any = module.config
    parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    sizes = [n for part in parts if isinstance(n := getattr(part, "vocab_size", None), int)]
    size = min([60, *sizes])
    return torch.randint(min(5, size - 1), size, (1, LENGTH), generator=generator)


def _images(
    module: nn.Module, where: str, config: Any, common: dict[str, Any], generator: torch.Generator
) -> Iterator[Forward]:
    """Yield a forward pass with an image of the configured size."""
    patch, channels = _get(config, "patch_size", default=16), _get(config, "num_channels", "in_channels", default=3)
    size = _get(config, "image_size", default=None)
    size = size if size is not None else 4 * (patch if isinstance(patch, int) else patch[0])
    height, width = (size, size) if isinstance(size, int) else size
    extra = dict(common)
    if bool(getattr(config, "is_encoder_decoder", False)) or _accepts(module, "decoder_input_ids"):
        extra["decoder_input_ids"] = _ids(module, generator)
    picture = torch.randn((1, channels, height, width), generator=generator)
    yield Forward(f"{where}(pixel_values {tuple(picture.shape)})", module, (), {"pixel_values": picture, **extra})


def _patches(module: nn.Module, where: str, config: Any, generator: torch.Generator) -> Forward:
    """Return a forward pass with flattened image patches [patches, values] and the grid that they form."""
    patch, channels = _get(config, "patch_size", default=14), _get(config, "in_channels", "num_channels", default=3)
    merge = int(_get(config, "spatial_merge_size", default=1))
    temporal = int(_get(config, "temporal_patch_size", default=1))
    rows = torch.randn((4 * merge * merge, channels * temporal * patch * patch), generator=generator)
    return Forward(f"{where}(patches {tuple(rows.shape)})", module, (rows, torch.tensor([[1, 2 * merge, 2 * merge]])))


def _sound(
    module: nn.Module, where: str, name: str, config: Any, common: dict[str, Any], generator: torch.Generator
) -> Iterator[Forward]:
    """Yield forward passes with mel frames of the configured length, or with samples, in two shapes each."""
    mels = _get(config, "num_mel_bins", "feature_size", "mel_bins", "num_mel_bins", default=80)
    frames = 2 * int(_get(config, "max_source_positions", default=50))
    extra = dict(common)
    if bool(getattr(config, "is_encoder_decoder", False)):
        extra["decoder_input_ids"] = _ids(module, generator)
    shapes = [(1, mels, frames), (1, frames, mels)] if name == "input_features" else [(1, 4000), (1, 1, 4000)]
    for shape in shapes:
        sound = torch.randn(shape, generator=generator)
        yield Forward(f"{where}({name} {shape})", module, (), {name: sound, **extra})
