"""What is in ``param_groups``: built from a model, recognised, and tracked while the caller edits the groups."""

from .following import Arrangement, Frozen, require_groups, require_initialised
from .models import Source, with_model_names
from .recognition import Recognition
from .states import first_state, total_state_bytes

__all__ = [
    "Arrangement",
    "Frozen",
    "Recognition",
    "Source",
    "first_state",
    "require_groups",
    "require_initialised",
    "total_state_bytes",
    "with_model_names",
]
