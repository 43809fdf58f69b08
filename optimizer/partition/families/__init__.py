"""The table of model families: which module makes its parameters how.

To add a family, add one ``Family`` to the file of its kind: the class (or the children) it is recognised by, one line
per parameter, and why. The first family that matches a module speaks of its parameters, and the next ones of those it
left; parameters no family claims are left to the plain layers (``LAYERS``), then to ``BARE``, then to names. Prove an
entry with ``python -m optimizer verify``.
"""

from .attention import SEPARATE
from .feedforward import FEEDFORWARD
from .fused import FUSED
from .latent import LATENT
from .mixers import MIXERS
from .plain import BARE, LAYERS, Bare
from .table import Context, Family, Maker, is_convolution, is_dense, is_wrapper, parametrised, resolve, stored

FAMILIES: tuple[Family, ...] = (*FUSED, *LATENT, *SEPARATE, *MIXERS, *FEEDFORWARD)

__all__ = [
           "BARE",
           "FAMILIES",
           "LAYERS",
           "Bare",
           "Context",
           "Family",
           "Maker",
           "is_convolution",
           "is_dense",
           "is_wrapper",
           "parametrised",
           "resolve",
           "stored",
]  # fmt: skip
