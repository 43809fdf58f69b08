"""Real text as bytes, split once and for all, and batches that are a pure function of (seed, step)."""

from .enwik8 import enwik8
from .sampler import Corpus, batch_at, context_batch_at, fixed_batches
from .stdlib import CLASSES, python_stdlib, reduced

__all__ = [
    "CLASSES", "Corpus", "batch_at", "context_batch_at", "enwik8", "fixed_batches", "load", "python_stdlib", "reduced",
]  # fmt: skip


def load(name: str) -> Corpus:
    """A corpus by its name: ``python-stdlib`` (offline), ``python-stdlib-8`` (8 character classes) or ``enwik8``.

    Raises:
        ValueError: an unknown name.
    """
    makers = {"python-stdlib": python_stdlib, "python-stdlib-8": lambda: reduced(python_stdlib()), "enwik8": enwik8}
    if name not in makers:
        raise ValueError(f"data={name!r} is unknown; choose one of {sorted(makers)}")
    return makers[name]()
