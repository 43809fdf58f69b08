"""Ways to take a step, and the choice between them.

``eager`` (``optimizer.update``) works tensor by tensor; ``foreach`` over lists of tensors; ``native`` is one pass over
memory for CPUs; ``traced`` is for autograd and graph capture; ``operator`` is all of them as compilers see them.
"""

from .dispatch import Engines
from .operator import register, traced_step

__all__ = ["Engines", "register", "traced_step"]
