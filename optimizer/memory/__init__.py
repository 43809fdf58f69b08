"""Ways to train with less device memory: step inside the backward pass, or keep the optimizer's state on the host."""

from .offload import CPUOffload
from .release import GradientRelease, gradient_release

__all__ = ["CPUOffload", "GradientRelease", "gradient_release"]
