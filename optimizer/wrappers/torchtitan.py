"""torchtitan 0.3's optimizer container with support for "AdamMini". Import it in a ``config_registry``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from ..adam_mini import AdamMini
from ..partition import Rules
from ..partition.discover import tag, tagged
from ..state.checkpoint import identity, same_rules

NAME = "AdamMini"


class AdamMiniContainer(OptimizersContainer):
    """torchtitan's optimizer container, which also accepts the optimizer name "AdamMini".

    The options of a group (lr, betas, exp_avg_dtype, ...) are its ``optimizer_kwargs``. The options of the optimizer
    (``rules``, ``strict``) belong in ``optimizer_factory_kwargs_by_name["AdamMini"]``.

    Raises:
        ValueError: ``rules`` or ``strict`` is in ``optimizer_kwargs``, the implementation is "fused_opt_states_bf16",
            or a checkpoint was saved under other rules.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The container's configuration."""

        exempt_norms: bool = True
        """Move norms and biases of each AdamMini group to a group without weight decay, as ``AdamMini(model)`` does."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "optimizer.implementation='fused_opt_states_bf16' creates state for torch's Adam; use 'fused', and "
                "'exp_avg_dtype': torch.bfloat16 in optimizer_kwargs (second moments stay fp32, because they are small)"
            )
        for group in config.param_groups:
            misplaced = group.optimizer_kwargs.keys() & {"rules", "strict"}
            if group.optimizer_name == NAME and misplaced:
                raise ValueError(
                    f"optimizer_kwargs of pattern {group.pattern!r} has {min(misplaced)!r}, which is an option of the "
                    f"optimizer and not of a group; put it into optimizer_factory_kwargs_by_name[{NAME!r}]"
                )
        for part in model_parts:
            tag(part)  # FSDP has replaced the parameters by new ones, so tags from before sharding are lost
        self._exempt_norms = config.exempt_norms
        super().__init__(config, model_parts=model_parts)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return AdamMini if name == NAME else OptimizersContainer._resolve_optimizer_factory(name)

    def _build_param_groups(self, model: nn.Module, *arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        groups, patterns = OptimizersContainer._build_param_groups(model, *arguments)
        if self._exempt_norms and NAME in groups:
            pairs = zip(groups[NAME], patterns[NAME], strict=True)
            split = [(half, pattern) for group, pattern in pairs for half in _split(group)]
            groups[NAME], patterns[NAME] = [half for half, _ in split], [pattern for _, pattern in split]
        return groups, patterns

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of ``state_dict``.

        The rules are compared in this method, because torchtitan does not pass their name to the optimizer.
        """
        for optimizer in self.optimizers:
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            for name in names if isinstance(optimizer, AdamMini) else ():
                saved = state_dict.get(f"param_groups.{name}.rules", identity(optimizer.rules))
                if not same_rules(saved, optimizer.rules):
                    raise ValueError(
                        f"the checkpoint keeps {name} under rules {saved!r}, this optimizer has "
                        f"{identity(optimizer.rules)!r}; use the rules of the checkpoint, or start with fresh state: "
                        "--checkpoint.exclude_from_loading"
                    )
        super().load_state_dict(state_dict)


def default_adam_mini(
    lr: float = 8e-4, *, rules: str | Rules = "adam_mini", strict: bool = False, **options: Any
) -> AdamMiniContainer.Config:
    """Return a config with AdamMini for all parameters and the hyper-parameters of torchtitan's ``default_adamw``.

    Args:
        lr: learning rate.
        rules: which unit of each role shares a second-moment scalar.
        strict: raise an error for a weight of unknown role.
        **options: further options of the group.
    """
    hyper_parameters = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1} | options
    return AdamMiniContainer.Config(
        param_groups=[ParamGroupConfig(pattern=r".*", optimizer_name=NAME, optimizer_kwargs=hyper_parameters)],
        optimizer_factory_kwargs_by_name={NAME: {"rules": rules, "strict": strict}},
    )


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group into its parameters that decay and those that do not; leave out an empty half."""
    exempt = [(anatomy := tagged(p)) is not None and not anatomy.decays for p in group["params"]]
    halves = []
    for is_exempt, decay in ((False, {}), (True, {"weight_decay": 0.0})):
        chosen = [i for i, value in enumerate(exempt) if value is is_exempt]
        members = {key: [group[key][i] for i in chosen] for key in ("params", "param_names")}
        halves.append(group | members | decay)
    return [half for half in halves if half["params"]]
