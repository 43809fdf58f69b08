"""Adam-mini with rules that say, role by role, what may share one second-moment scalar.

from optimizer import AdamMini
optimizer = AdamMini(model, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
"""

from . import wrappers as _wrappers  # noqa: F401 - registers them
from .adam_mini import AdamMini
from .partition import Layout, Role, Rules, Unit, partition, tag
from .tools.explain import explain

__all__ = ["AdamMini", "Layout", "Role", "Rules", "Unit", "explain", "partition", "tag"]
