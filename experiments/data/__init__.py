"""Text corpora as bytes with fixed splits, batches that are a pure function of (seed, step), and Fashion-MNIST."""

from .enwik8 import enwik8
from .fashion import fashion_mnist
from .sampler import Corpus, batch_at, context_batch_at, fixed_batches
from .stdlib import CLASSES, python_stdlib, reduced

__all__ = [
    "CLASSES",
    "Corpus",
    "batch_at",
    "context_batch_at",
    "enwik8",
    "fashion_mnist",
    "fixed_batches",
    "load",
    "python_stdlib",
    "reduced",
]


def load(name: str) -> Corpus:
    """Load a corpus by name: ``python-stdlib`` (offline), ``python-stdlib-8`` (8 character classes) or ``enwik8``.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the Python installation has no standard library sources.
        RuntimeError: enwik8 cannot be downloaded, or its content is wrong.
    """
    makers = {"python-stdlib": python_stdlib, "python-stdlib-8": lambda: reduced(python_stdlib()), "enwik8": enwik8}
    if name not in makers:
        raise ValueError(f"data={name!r} is unknown; choose one of {sorted(makers)}")
    return makers[name]()
