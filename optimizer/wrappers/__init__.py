"""Everything that knows another library. Each library is imported when it is asked for, and not before.

Wrappers that change a model's parameters or an optimizer's groups are registered here, one line each.
"""

from ..interface import register
from .deepspeed.flats import DeepSpeed
from .fsdp1 import FSDP1

register(FSDP1())
register(DeepSpeed())
