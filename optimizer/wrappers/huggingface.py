"""Hugging Face's Trainer: AdamMini from the model, so that every weight's role is known.

Nothing of transformers is imported here: its Trainer is what the mixin is mixed into, and what calls the factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adam_mini import AdamMini


def adam_mini() -> type[AdamMini]:
    """A factory for ``Trainer(optimizer_cls_and_kwargs=(adam_mini, options))``.

    For a class Trainer makes groups of bare parameters; for any other callable it calls what that returns with the
    model and the options. So ``AdamMini`` gets the model; ``lr``, ``betas``, ``eps`` and ``weight_decay`` are what the
    options say, not what TrainingArguments do.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=(adam_mini, {"lr": 3e-4, "weight_decay": 0.1}), ...)
    """
    return AdamMini


class AdamMiniMixin:
    """In front of any Trainer: ``class MyTrainer(AdamMiniMixin, Trainer)``; TRL's trainers are such, too.

    ``learning_rate``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` and ``weight_decay`` of the TrainingArguments
    are what they say (Trainer's own default is no decay); norms and biases do not decay; ``optim`` is not looked at.
    An optimizer that Trainer was given is left alone.
    """

    adam_mini_options: ClassVar[Mapping[str, Any]] = {}
    """Further options of AdamMini, such as ``{"rules": "slim_adam"}``; a subclass sets them."""

    args: Any
    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any

    def create_optimizer(self, model: nn.Module | None = None) -> AdamMini:
        """Make the optimizer where there is none; Trainer calls it with the model as FSDP1 wrapped it, or without.

        Raises:
            ValueError: Trainer was told of another optimizer to make.
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
            if (
                model is not None
            ):  # FSDP1: on resuming, an optimizer without state is loaded with none, whatever was saved
                self.optimizer.init_state()
        return self.optimizer
