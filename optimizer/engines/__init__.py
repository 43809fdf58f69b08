"""Ways to take a step, and the choice between them.

``eager`` (``optimizer.update``) works tensor by tensor; ``foreach`` over lists of tensors; ``native`` is one pass over
memory for CPUs; ``traced`` is for autograd, graph capture and compilers.
"""

from .dispatch import Engines

__all__ = ["Engines"]
