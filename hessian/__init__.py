"""Measure a model's curvature, exactly if it is small and by probes if it is large, and derive rules from it.

from hessian import HessianOperator, dense, slq, block_norms, block_structure, derive
H = HessianOperator(model, loss, params, batches)
"""

from .derive import Evidence, derive, factored_gap, jensen_gap
from .exact import dense
from .lanczos import extreme_eigenvalues, js_distance, slq
from .operators import HessianOperator, LinearMap, MatrixOperator
from .probing import block_norms
from .results import BlockNorms, BlockStructure, SpectralDensity
from .structure import block_structure, preconditioned_ratio, snr, tau

__all__ = [
    "BlockNorms",
    "BlockStructure",
    "Evidence",
    "HessianOperator",
    "LinearMap",
    "MatrixOperator",
    "SpectralDensity",
    "block_norms",
    "block_structure",
    "dense",
    "derive",
    "extreme_eigenvalues",
    "factored_gap",
    "jensen_gap",
    "js_distance",
    "preconditioned_ratio",
    "slq",
    "snr",
    "tau",
]
