"""Ways to take a step, and the choice between them.

``eager`` (``optimizer.step.update``) works tensor by tensor; ``foreach`` over lists of tensors; ``native`` is one pass
over memory for CPUs; ``traced`` is for autograd and graph capture; ``compiled`` is all of them as compilers see them.
"""

from .compiled import register, traced_step
from .dispatch import Engines

__all__ = ["Engines", "register", "traced_step"]
