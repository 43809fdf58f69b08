"""Adam-mini, an AdamW in which blocks of parameters share one second-moment scalar.

Rules assign to each role of a parameter the elements that share a scalar.

    from optimizer import AdamMini
    optimizer = AdamMini(model, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
"""

from . import wrappers as _wrappers  # noqa: F401 - importing it registers the wrappers
from .adam_mini import AdamMini
from .partition import Layout, Role, Rules, Unit, partition, tag
from .tools.explain import explain

__all__ = ["AdamMini", "Layout", "Role", "Rules", "Unit", "explain", "partition", "tag"]
