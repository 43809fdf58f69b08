"""The table of model families: what the parameters of known kinds of modules do.

To add a family, add one ``Family`` to the file of its kind: the class or the children that identify the module, one
line per parameter, and the reason. The first family that matches a module describes its parameters; later ones
describe only those that are left. Parameters that no family claims are looked up among the plain layers (``LAYERS``),
then in ``BARE``, and then by name. Check an entry with ``python -m optimizer verify``.
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
]
