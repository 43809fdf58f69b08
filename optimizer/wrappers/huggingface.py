"""AdamMini in Hugging Face's Trainer, built from the model, so that the role of every weight can be found.

This module does not import transformers. Its Trainer calls the factory, or is a base class next to the mixin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adam_mini import AdamMini


def adam_mini() -> type[AdamMini]:
    """Return the class AdamMini; a factory for ``Trainer(optimizer_cls_and_kwargs=(adam_mini, options))``.

    Trainer passes groups of bare parameters to a class. It calls any other callable without arguments, and calls the
    result with the model and the options. ``AdamMini`` therefore gets the model. ``lr``, ``betas``, ``eps`` and
    ``weight_decay`` come from the options, not from TrainingArguments.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=(adam_mini, {"lr": 3e-4, "weight_decay": 0.1}), ...)
    """
    return AdamMini


class AdamMiniMixin:
    """A mixin that makes any Trainer build AdamMini: ``class MyTrainer(AdamMiniMixin, Trainer)``.

    It works with TRL's trainers, too. The hyper-parameters are ``learning_rate``, ``adam_beta1``, ``adam_beta2``,
    ``adam_epsilon`` and ``weight_decay`` of the TrainingArguments (Trainer's default is no decay). Norms and biases do
    not decay. The argument ``optim`` is ignored. An optimizer that was passed to Trainer is used unchanged.
    """

    adam_mini_options: ClassVar[Mapping[str, Any]] = {}
    """Further options of AdamMini, such as ``{"rules": "slim_adam"}``, which a subclass may set."""

    args: Any
    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any

    def create_optimizer(self, model: nn.Module | None = None) -> AdamMini:
        """Build the optimizer if there is none, and return it. Trainer calls this method.

        Args:
            model: the model as FSDP1 wrapped it; None for the Trainer's model.

        Raises:
            ValueError: ``optimizer_cls_and_kwargs`` asks Trainer for another optimizer.
        """
        if getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError(
                f"optimizer_cls_and_kwargs={self.optimizer_cls_and_kwargs!r} asks Trainer for one optimizer and "
                "AdamMiniMixin makes another; use one of the two"
            )
        if self.optimizer is None:
            args = self.args
            self.optimizer = AdamMini(
                self.model if model is None else model,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                **self.adam_mini_options,
            )
            if model is not None:  # FSDP1 loads no state into an optimizer that has none, so resuming needs it now
                self.optimizer.init_state()
        return self.optimizer
