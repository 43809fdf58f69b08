"""What the parameters of an optimizer are, for as long as their layouts are being made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..interface import whole_shape, wrappers
from ..partition import Anatomy, Layout, Role, Rules, discover, layout_of
from ..partition.apply import understood
from ..partition.discover import report_unknown, tagged_name, tagged_or_named
from ..partition.layout import AnyLayout
from ..partition.names import is_guessed_vector
from ..sharding.facts import facts_of
from ..step.labels import named


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, with names: what decays, and norms and biases, which do not.

    Raises:
        ValueError: nothing in the model is trainable.
    """
    anatomies = discover(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; unfreeze some before building the optimizer")
    # What FSDP flattened into one parameter has no name of its own; its layout knows what in it does not decay.
    decays = {name: name not in anatomies or anatomies[name].decays for name, _ in trainable}
    decaying = {"params": [(name, p) for name, p in trainable if decays[name]]}
    rest = {"params": [(name, p) for name, p in trainable if not decays[name]], "weight_decay": 0.0}
    return [group for group in (decaying, rest) if group["params"]]


class Recognition:
    """Parameters recognised by the model, else by their tags, else by their names, and laid out under rules.

    It knows a model's parameters by identity, which is only right while nobody replaces them: make one, use it, and
    let it go.

    Args:
        model: the model; None where nobody gave it.
        rules: what shares a scalar.
        exempt: norms and biases that a library joined with what decays do not decay.

    Raises:
        ValueError: as of ``discover``.
    """

    def __init__(self, model: nn.Module | None, rules: Rules, *, exempt: bool = False) -> None:
        self._rules, self._exempt = rules, exempt
        self._unknown: dict[str, Anatomy] = {}
        parameters = {} if model is None else dict(model.named_parameters())
        anatomies = {} if model is None else discover(model)
        self._known = {id(parameters[name]): (name, a) for name, a in anatomies.items() if name in parameters}

    def layouts(self, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """The layouts of (parameter, name or an empty one) pairs.

        Raises:
            ValueError: rules with overrides by name, and a parameter without one.
        """
        self.ask_wrappers(pairs)
        return [self._layout(parameter, name) for parameter, name in pairs]

    def ask_wrappers(self, pairs: Sequence[tuple[Tensor, str]]) -> None:
        """Let wrappers leave on flattened parameters what they hold."""
        for wrapper in wrappers():
            wrapper.describe_parameters(pairs, tagged_or_named)

    def anatomy(self, parameter: Tensor, name: str) -> Anatomy:
        """What a parameter is."""
        known = self._known.get(id(parameter))
        return known[1] if known else tagged_or_named(parameter, name, whole_shape(parameter))

    def full_name(self, parameter: Tensor, name: str = "") -> str:
        """The name that overrides of the rules speak of: the caller's, else the model's, else the tag's."""
        return name or self._known.get(id(parameter), ("", None))[0] or tagged_name(parameter)

    def _layout(self, parameter: Tensor, name: str) -> AnyLayout:
        if facts := facts_of(parameter):
            return facts.layout(self._layout_of, exempt=self._exempt)
        return self._layout_of(self.anatomy(parameter, name), self.full_name(parameter, name), name)

    def _layout_of(self, anatomy: Anatomy, full_name: str, name: str = "") -> Layout:
        if self._rules.overrides and not full_name:
            raise ValueError(
                f"rules {self._rules.name!r} have overrides by name ({self._rules.overrides[0].pattern!r}), but a "
                f"parameter of shape {anatomy.shape} has no name; pass the model, model.named_parameters(), "
                "or tag(model) first"
            )
        if not understood(anatomy, self._rules, full_name) or is_guessed_vector(anatomy):
            self._unknown[name or full_name or f"unnamed #{len(self._unknown)}"] = anatomy
        return layout_of(anatomy, self._rules, full_name)

    def require_matches(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Every override of the rules speaks of a parameter of the model, frozen ones included, or of the groups."""
        pairs = [pair for group in groups for pair in named(group)]
        own = (self.full_name(parameter, name) for parameter, name in pairs)
        flat = (name for parameter, _ in pairs if (facts := facts_of(parameter)) for name in facts.names)
        self._rules.require_matches([*own, *flat, *(name for name, _ in self._known.values())])

    def report(self, *, strict: bool) -> None:
        """Say, once, what was not recognised; raises ValueError instead with ``strict``."""
        report_unknown(self._unknown, self._rules[Role.OTHER].value, strict=strict)
        self._unknown = {}
