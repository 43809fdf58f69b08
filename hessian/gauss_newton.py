"""The generalised Gauss-Newton matrix of a mean loss as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp

from .kept_graph import KeptGraph, Product
from .operators import Call, HessianOperator


class GGNOperator(HessianOperator):
    """The generalised Gauss-Newton matrix of the mean loss over all examples of all batches.

    The loss is ``criterion(outputs(model, batch), batch)``. With J the Jacobian of the outputs in the parameters and
    H_out the Hessian of the criterion in the outputs, the matrix is G = J^T H_out J (Schraudolph 2002). The Hessian is
    G + R, where R weighs the outputs' own second derivatives with the criterion's gradient. G is positive semidefinite
    if the criterion is convex in the outputs, as cross-entropy in logits and squared error are. For cross-entropy G
    equals the Fisher information of the model's predictions. Products are exact.

    Args:
        model: as in ``HessianOperator``.
        outputs: ``outputs(model, batch)`` -> tensor, such as logits.
        criterion: ``criterion(outputs, batch)`` -> 0-dim tensor, the mean loss over the batch. It must not use the
            parameters, except through the outputs.
        params: as in ``HessianOperator``, as all further arguments.
        batches: batches of one structure; they may differ in size.
        options: ``count``, ``mean_check`` and ``chunk`` of ``HessianOperator``.

    Raises:
        TypeError: params, a batch or the loss has the wrong type.
        ValueError: params, a batch or the loss is not usable, as in ``HessianOperator``.
        RuntimeError: an operation in the model has no derivative.

    Example:
        >>> G = GGNOperator(model, lambda m, b: m(b[0]), lambda out, b: cross_entropy(out, b[1]), None, batches)
        >>> R = HessianOperator(model, lambda m, b: cross_entropy(m(b[0]), b[1]), None, batches) @ v - G @ v
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[nn.Module, Any], Tensor],
        criterion: Callable[[Tensor, Any], Tensor],
        params: dict[str, Tensor] | None = None,
        batches: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        self._network, self._criterion = Call(model, outputs), criterion
        super().__init__(model, lambda m, batch: criterion(outputs(m, batch), batch), params, batches, **options)

    def _outputs_at(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        swapped = {f"model.{name}": tensor for name, tensor in theta.items()} | self._buffers
        out: Tensor = functional_call(self._network, swapped, (batch,), tie_weights=True)
        return out

    def _field(self, batch: Any) -> Product:
        """Return theta -> J^T criterion'(outputs(theta)), with J taken at the weights."""

        def pulled_back(theta: dict[str, Tensor]) -> dict[str, Tensor]:
            transposed = vjp(lambda t: self._outputs_at(t, batch), self._theta)[1]
            gradient: dict[str, Tensor] = transposed(grad(self._criterion)(self._outputs_at(theta, batch), batch))[0]
            return gradient

        return pulled_back

    def _forward_product(self, tangent: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Multiply by J, then by H_out, then by J^T, without differentiating J^T as the field's derivative would."""
        outputs, transposed = vjp(lambda theta: self._outputs_at(theta, batch), self._theta)[:2]
        change = jvp(lambda theta: self._outputs_at(theta, batch), (self._theta,), (tangent,))[1]
        curved = jvp(lambda out: grad(self._criterion)(out, batch), (outputs,), (change,))[1]
        product: dict[str, Tensor] = transposed(curved)[0]
        return product

    def _graph(self, i: int) -> KeptGraph:
        """Use no graph: the derivative of the gradient is the Hessian."""
        raise NotImplementedError

    def _program(self, batch: Any) -> Product:
        outputs, forward = linearize(lambda theta: self._outputs_at(theta, batch), self._theta)
        curve = linearize(lambda out: grad(self._criterion)(out, batch), outputs)[1]
        transposed = vjp(lambda theta: self._outputs_at(theta, batch), self._theta)[1]
        return lambda tangent: transposed(curve(forward(tangent)))[0]
