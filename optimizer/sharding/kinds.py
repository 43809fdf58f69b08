"""DTensor checks that do not import ``torch.distributed.tensor``.

That import takes longer than all other imports of torch together.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a DTensor. There are none as long as nothing has imported their module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_dtensor_type(kind: type) -> bool:
    """Return whether values of a type are DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; return any other tensor unchanged."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
