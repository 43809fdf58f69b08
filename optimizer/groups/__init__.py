"""What is in ``param_groups``: made from a model, recognised, and followed where the caller edits them."""

from .following import Arrangement, Frozen, require_groups, require_initialised
from .recognition import Recognition, groups_of

__all__ = ["Arrangement", "Frozen", "Recognition", "groups_of", "require_groups", "require_initialised"]
