"""Measure a model's curvature, exactly if it is small and by probes if it is large, and derive rules from it.

from hessian import HessianOperator, dense, slq, block_norms, block_structure, derive
H = HessianOperator(model, loss, params, batches)
"""

from .derive import Evidence, derive, factored_gap, jensen_gap
from .distributed import RankOperator
from .estimators import diagonal, trace
from .exact import dense
from .gauss_newton import GGNOperator
from .lanczos import eigenpairs, extreme_eigenvalues, js_distance, slq
from .linear import LinearMap, MatrixOperator
from .operators import HessianOperator
from .probing import block_norms
from .results import BlockNorms, BlockStructure, Eigenpairs, Estimate, SpectralDensity
from .structure import block_structure, preconditioned_ratio, snr, tau

__all__ = [
    "BlockNorms",
    "BlockStructure",
    "Eigenpairs",
    "Estimate",
    "Evidence",
    "GGNOperator",
    "HessianOperator",
    "LinearMap",
    "MatrixOperator",
    "RankOperator",
    "SpectralDensity",
    "block_norms",
    "block_structure",
    "dense",
    "derive",
    "diagonal",
    "eigenpairs",
    "extreme_eigenvalues",
    "factored_gap",
    "jensen_gap",
    "js_distance",
    "preconditioned_ratio",
    "slq",
    "snr",
    "tau",
    "trace",
]
