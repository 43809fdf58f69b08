"""All code that depends on other libraries. Each library is imported only when it is used.

Wrappers of libraries that change a model's parameters or an optimizer's groups are registered here, one line each.
"""

from ..interface import register
from .deepspeed.flats import DeepSpeed
from .fsdp1 import FSDP1

register(FSDP1())
register(DeepSpeed())
