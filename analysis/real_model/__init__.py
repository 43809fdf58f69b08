"""Statistics of the Hessian of a real model: shares inside blocks, maps, spectra, gaps. See docs/real_model.md."""

from .gaps import choices, difference, evidence, gaps
from .maps import BlockMap, Spectrum, block_map, head_contrasts, head_shares, neuron_contrasts, spectrum
from .numbers import Number, by_chance, ratio, relative_error, stratified
from .shares import LayerMap, between_matrices, by_role, energy, layer_map, matrices, of_model
from .study import CONTROL, HEAD_ROLES, PARTITIONS, WHOLE, Study, load

__all__ = [
    "CONTROL", "HEAD_ROLES", "PARTITIONS", "WHOLE", "BlockMap", "LayerMap", "Number", "Spectrum", "Study",
    "between_matrices", "block_map", "by_chance", "by_role", "choices", "difference", "energy", "evidence", "gaps",
    "head_contrasts", "head_shares", "layer_map", "load", "matrices", "neuron_contrasts", "of_model", "ratio",
    "relative_error", "spectrum", "stratified",
]  # fmt: skip
