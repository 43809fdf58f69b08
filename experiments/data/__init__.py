"""Corpora with fixed splits, as bytes or prepared tokens, batches as a function of (seed, step), and Fashion-MNIST."""

from .enwik8 import enwik8
from .fashion import fashion_mnist
from .prepared import is_prepared, prepared
from .sampler import Corpus, batch_at, context_batch_at, epoch_rows, fixed_batches
from .stdlib import CLASSES, python_stdlib, reduced

__all__ = [
    "CLASSES",
    "Corpus",
    "batch_at",
    "context_batch_at",
    "enwik8",
    "epoch_rows",
    "fashion_mnist",
    "fixed_batches",
    "load",
    "python_stdlib",
    "reduced",
]


PREPARABLE = ("openwebtext-", "c4-", "enwik8-")
"""Beginnings of the names of corpora that have to be prepared."""


def load(name: str) -> Corpus:
    """Load a corpus by name: ``python-stdlib`` (offline), ``python-stdlib-8`` (8 character classes), ``enwik8``, or one
    that ``experiments.data.prepare`` has made, such as ``openwebtext-gpt2``.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the Python installation has no standard library sources, or the corpus is not prepared.
        RuntimeError: enwik8 cannot be downloaded, or content is wrong.
    """
    makers = {"python-stdlib": python_stdlib, "python-stdlib-8": lambda: reduced(python_stdlib()), "enwik8": enwik8}
    if name not in makers and is_prepared(name):
        return prepared(name)
    if name not in makers and name.startswith(PREPARABLE):
        source, _, tokeniser = name.partition("-")
        raise FileNotFoundError(
            f"data={name!r} is not prepared; run `python -m experiments.data.prepare {source} --tokenizer "
            f"{tokeniser or 'gpt2'}` on a machine with a connection (docs/gpu.md)"
        )
    if name not in makers:
        raise ValueError(f"data={name!r} is unknown; choose one of {sorted(makers)}")
    return makers[name]()
