"""Recognition of what the parameters of an optimizer do, and their layouts."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..interface import whole_shape, wrappers
from ..partition import Anatomy, Role, Rules, TensorLayout, discover, layout_of
from ..partition.apply import understood
from ..partition.discover import report_unknown, tagged_name, tagged_or_named
from ..partition.layout import AnyLayout
from ..partition.names import is_guessed_vector
from ..sharding.facts import facts_of
from ..step.labels import named


class Recognition:
    """Determines what parameters do, from the model, their tags or their names, and makes their layouts.

    Parameters of the model are looked up by ``id``, which is valid only until somebody replaces them. Therefore
    create an object, use it and discard it.

    Args:
        model: the model that the parameters belong to; None if it is not available.
        rules: which elements share a scalar.
        exempt: whether norms and biases are exempt from weight decay if a library joined them with weights in one
            flattened parameter.

    Raises:
        ValueError: ``discover`` refuses the model.
    """

    def __init__(self, model: nn.Module | None, rules: Rules, *, exempt: bool = False) -> None:
        self._rules, self._exempt = rules, exempt
        self._unknown: dict[str, Anatomy] = {}
        parameters = {} if model is None else dict(model.named_parameters())
        anatomies = {} if model is None else discover(model)
        self._in_model = {id(parameters[name]): (name, a) for name, a in anatomies.items() if name in parameters}

    @classmethod
    def of(cls, model: weakref.ref[nn.Module] | None, rules: Rules) -> Recognition:
        """Recognise parameters that are added later: with the model if it still exists, then by tags and names."""
        try:
            return cls(None if model is None else model(), rules)
        except ValueError:  # the model was changed and now contradicts its configuration
            return cls(None, rules)

    def layouts(self, pairs: Sequence[tuple[Tensor, str]]) -> list[AnyLayout]:
        """Return the layouts of (parameter, name) pairs; an unnamed parameter has the name "".

        Raises:
            ValueError: the rules have overrides by name, and a parameter has no name.
        """
        self.ask_wrappers(pairs)
        return [self._layout(parameter, name) for parameter, name in pairs]

    def ask_wrappers(self, pairs: Sequence[tuple[Tensor, str]]) -> None:
        """Let the registered wrappers describe the contents of parameters that their libraries flattened."""
        for wrapper in wrappers():
            wrapper.describe_parameters(pairs, tagged_or_named)

    def anatomy(self, parameter: Tensor, name: str) -> Anatomy:
        """Return what a parameter does: from the model, otherwise from its tag, otherwise from its name."""
        entry = self._in_model.get(id(parameter))
        return entry[1] if entry else tagged_or_named(parameter, name, whole_shape(parameter))

    def full_name(self, parameter: Tensor, name: str = "") -> str:
        """Return the name that overrides are matched with: the caller's, otherwise the model's, otherwise the tag's."""
        return name or self._in_model.get(id(parameter), ("", None))[0] or tagged_name(parameter)

    def _layout(self, parameter: Tensor, name: str) -> AnyLayout:
        if facts := facts_of(parameter):
            return facts.layout(self._layout_of, exempt=self._exempt)
        return self._layout_of(self.anatomy(parameter, name), self.full_name(parameter, name), name)

    def _layout_of(self, anatomy: Anatomy, full_name: str, name: str = "") -> TensorLayout:
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
        """Check that every override matches a parameter of the groups or of the model, frozen ones included.

        Raises:
            ValueError: an override matches none of them.
        """
        pairs = [pair for group in groups for pair in named(group)]
        group_names = (self.full_name(parameter, name) for parameter, name in pairs)
        flattened = (name for parameter, _ in pairs if (facts := facts_of(parameter)) for name in facts.names)
        model_names = (name for name, _ in self._in_model.values())
        self._rules.require_matches([*group_names, *flattened, *model_names])

    def report(self, *, strict: bool) -> None:
        """Log once which parameters were not recognised.

        Raises:
            ValueError: with ``strict``, if there are any weights among them.
        """
        report_unknown(self._unknown, self._rules[Role.OTHER].value, strict=strict)
        self._unknown = {}
