"""Conversion of second moments to and from the factored form.

Row and column means of a second moment are exact whatever its blocks are: they are means over unions of its elements.
The other way, the factored second moment is computed for every element, and the means over the new blocks are those of
``blocks.rebuilt``. Row means of a factored second moment therefore convert to one scalar per row without error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..partition.factored import FactoredLayout, TensorLayout
from ..partition.layout import Layout
from ..partition.roles import viewed
from ..step.factored import column_mean, per_row
from .blocks import rebuilt
from .saved import Saved


def dense(rows: Tensor, columns: Tensor, layout: FactoredLayout, shape: Sequence[int]) -> Tensor:
    """Return the second moment of every element.

    Args:
        rows: means of rows, ``layout.aligned_shape(shape)``; not changed.
        columns: means of columns, ``layout.columns_shape(shape)``; not changed.
        layout: the layout of the tensor.
        shape: the tensor's shape.

    Returns:
        A new float64 tensor of that shape on the CPU.
    """
    r, c = layout.unfold(*(t.detach().to("cpu", torch.float64) for t in (rows, columns)))
    unfolded = layout.unfolded()
    mean = column_mean(c, unfolded)
    shares = c / mean.masked_fill(mean == 0, 1)
    return (r * per_row(shares, unfolded)).reshape(tuple(shape))


def factored(
    v: Tensor, layout: FactoredLayout, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the means of a second moment over rows, and over the columns of each part.

    Args:
        v: second moment of a tensor of shape ``shape``, in the aligned shape of any layout or one value per element.
        layout: the factored layout of the tensor.
        shape: the tensor's shape.
        dtype: dtype of the results.

    Returns:
        New tensors on the CPU, of ``layout.aligned_shape(shape)`` and ``layout.columns_shape(shape)``.

    Raises:
        ValueError: ``v`` or the layout cannot belong to a tensor of this shape.
    """
    rows = rebuilt(v, layout.rows, shape, dtype)
    # One value per element is exact for any blocks; a second moment whose axis 0 is coarser than the tensor is widened.
    every = rebuilt(v, Layout.per_element(tuple(shape)), shape, torch.float64)
    every = every.reshape(viewed(tuple(shape), layout.fold))
    unfolded = layout.unfolded()
    sums = torch.zeros(unfolded.columns_shape(every.shape), dtype=torch.float64)
    for part, start, length in unfolded.pieces():
        sums.narrow(layout.axis, part, 1).add_(every.narrow(layout.axis, start, length).sum(layout.axis, keepdim=True))
    sizes = [-1 if dim == layout.axis else 1 for dim in range(every.dim())]
    columns = sums / layout.part_sizes().clamp(min=1).double().reshape(sizes)
    return rows, columns.to(dtype).reshape(layout.columns_shape(shape))


def converted_second_moment(
    saved: Saved, layout: TensorLayout, shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> dict[str, Tensor]:
    """Rebuild a saved second moment for a layout from block means, or from row and column means.

    Args:
        saved: the parameter's state in the checkpoint.
        layout: the layout of the whole parameter.
        shape: the parameter's shape.
        dtype: dtype of the result.
        where: description of the parameter for error messages.

    Returns:
        ``exp_avg_sq``, and ``exp_avg_sq_col`` under a factored layout, on the CPU.

    Raises:
        ValueError: the second moment is factored, and how the parameter's parts were factored is unknown.
    """
    v = saved.exp_avg_sq
    if saved.columns is not None:
        source = layout if isinstance(layout, FactoredLayout) else layout.factored
        if source is None or source.columns_shape(shape) != tuple(saved.columns.shape):
            raise ValueError(
                f"exp_avg_sq of {where} is factored with column means of shape {tuple(saved.columns.shape)} in the "
                "checkpoint, and its parts are unknown here; build the optimizer from the model, as the optimizer of "
                "the checkpoint was"
            )
        v = dense(v, saved.columns, source, shape)
    if isinstance(layout, FactoredLayout):
        rows, columns = factored(v, layout, shape, dtype)
        return {"exp_avg_sq": rows, "exp_avg_sq_col": columns}
    return {"exp_avg_sq": rebuilt(v, layout, shape, dtype)}
