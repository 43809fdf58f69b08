"""Ways to hold less memory while training: step inside the backward pass, or keep copies and state on the host."""

from .offload import CPUOffload
from .release import GradientRelease, gradient_release

__all__ = ["CPUOffload", "GradientRelease", "gradient_release"]
