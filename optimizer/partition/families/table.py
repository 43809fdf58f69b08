"""What a row of the table of families says, and how it finds its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..heads import ask, sources
from ..roles import Anatomy, Part, Role


@dataclass(frozen=True)
class Context:
    """Where a parameter was found: all that a maker may look at.

    Attributes:
        tensor: the parameter.
        owner: the module that holds it directly.
        modules: the module the family matched, then its ancestors, innermost first.
    """

    tensor: Tensor
    owner: nn.Module
    modules: Sequence[nn.Module]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.tensor.shape)

    @property
    def frame(self) -> tuple[int, int, int | None]:
        """(number of leading axes, output axis, input axis) of the parameter.

        Linear keeps (out, in); transformers' Conv1D (in, out); convolutions (out, in, ...); anything with more axes
        is a stack of (out, in) matrices, one per expert or codebook.
        """
        ndim = self.tensor.ndim
        if is_convolution(self.owner):
            return 0, 0, 1
        if ndim == 2 and any(cls.__name__ == "Conv1D" for cls in type(self.owner).__mro__):
            return 0, 1, 0
        return (ndim - 2, ndim - 2, ndim - 1) if ndim >= 2 else (0, 0, None)

    @property
    def outputs(self) -> int:
        """Size of the output axis."""
        return self.shape[self.frame[1]] if self.shape else 1

    def anatomy(self, parts: Sequence[Part], why: str, *, repeat: int = 1) -> Anatomy:
        """An anatomy whose parts lie along the output axis."""
        leading, axis, into = self.frame
        return Anatomy(self.shape, tuple(parts), why, axis=axis, in_axis=into, leading=leading, repeat=repeat)

    def plain(self, role: Role, why: str) -> Anatomy:
        """An anatomy of one part: every output unit does the same thing."""
        return self.anatomy((Part(role, self.outputs),), why)

    def ask(self, *names: str) -> int:
        """The first of these attributes that the matched module, its configuration or an ancestor knows.

        Raises:
            ValueError: nobody knows any of them.
        """
        found = ask(self.modules, names)
        if found is None:
            raise ValueError(
                f"{type(self.modules[0]).__name__} and the modules around it know none of {', '.join(names)}, which "
                "say how this weight is laid out; set one on the module or its configuration"
            )
        return found

    def number(self, name: str) -> int:
        """Like ``ask``, where zero is an answer too: the innermost source that has the attribute decides."""
        for source in sources(self.modules):
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return self.ask(name)

    def flag(self, name: str) -> bool:
        """Whether the matched module says so (its configuration, where it does not know)."""
        module = self.modules[0]
        return bool(getattr(module, name, getattr(getattr(module, "config", None), name, False)))

    def rows_of(self, paths: Sequence[str]) -> int | None:
        """Output size of the first of these sub-parameters of the matched module that exists."""
        for path in paths:
            found = resolve(self.modules[0], path)
            if found is not None:
                owner, tensor = found
                return Context(tensor, owner, self.modules).outputs
        return None


Maker = Callable[[Context, str], Anatomy]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        why: the reason, shown by ``explain``.
        params: parameter path below the matched module -> how it is made. A path to a sub-module means its weight.
        classes: names of the classes it is for, the module's bases included; with ``library`` set, only classes
            defined in that package count.
        children: sub-modules (or parameters) that must all exist, instead of, or besides, a class.
        library: the package the classes are defined in; None for any.
        fused: whether the layout inside a fused tensor is assumed from a name; never applied to a class of
            transformers, because there one name stands for several layouts.
    """

    why: str
    params: dict[str, Maker]
    classes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    library: str | None = None
    fused: bool = field(default=False)

    def claims(self, module: nn.Module) -> dict[str, Maker]:
        """The parameters of a matching module it speaks of."""
        return self.params

    def matches(self, module: nn.Module) -> bool:
        """Whether this row speaks of the module."""
        if self.classes and not any(
            cls.__name__ in self.classes and self.library in (None, cls.__module__.split(".")[0])
            for cls in type(module).__mro__
        ):
            return False
        if self.fused and type(module).__module__.startswith("transformers."):
            return False
        if self.children and not _has(module, self.children[0].partition(".")[0]):
            return False  # by far the most frequent answer, given without looking further
        return all(resolve(module, child) is not None for child in self.children)


def resolve(module: nn.Module, path: str) -> tuple[nn.Module, Tensor] | None:
    """(owner, parameter) at a dotted path below a module; a path to a sub-module means its ``weight``.

    A sub-module that only wraps one layer called ``linear``, ``base_layer``, ``base_module`` or ``original_module``
    stands for that layer, so that wrapped projections (PEFT's, DDP's, activation checkpointing's) are still found.
    """
    target: object = module
    for name in path.removesuffix(".weight").split("."):
        owner, target = target, _child(target, name)
    if isinstance(target, nn.Module):
        # An adapter layer has a weight of its own to show, its base layer's, and FSDP1 that of what it wraps: what is
        # inside says how the weight is laid out.
        while "base_layer" in target._modules or is_wrapper(target) or stored(target) is None:
            inner = next((m for n in _WRAPPED if isinstance(m := getattr(target, n, None), nn.Module)), None)
            if inner is None:
                return None
            target = inner
        owner, target = target, stored(target)
    elif isinstance(target, Tensor) and isinstance(owner, nn.Module):
        target = stored(owner, name)
    while isinstance(owner, nn.Module) and is_wrapper(owner):
        owner = next(owner._modules[name] for name in _AROUND if name in owner._modules)
    return (owner, target) if isinstance(owner, nn.Module) and isinstance(target, nn.Parameter) else None


def stored(module: nn.Module, leaf: str = "weight") -> nn.Parameter | None:
    """The parameter that a module's tensor of this name is, or is computed from element by element.

    A parametrization (``torch.nn.utils.parametrize``, and the older ``weight_norm`` and ``spectral_norm``) replaces
    the parameter by others. The one of the tensor's own shape has its rows and columns: weight norm's direction, for
    instance. None where there is no such parameter.
    """
    tensor = getattr(module, leaf, None)
    if isinstance(tensor, nn.Parameter):
        return tensor
    if not isinstance(tensor, Tensor):
        return None
    lists = getattr(module, "parametrizations", None)
    holder = lists[leaf] if isinstance(lists, nn.ModuleDict) and leaf in lists else module
    names = ("original", "original1", "original0") if holder is not module else (f"{leaf}_v", f"{leaf}_orig")
    candidates = (holder._parameters.get(name) for name in names)
    return next((p for p in candidates if p is not None and p.shape == tensor.shape), None)


def parametrised(context: Context, leaf: str) -> tuple[nn.Module, str]:
    """The module and the name of the tensor that a parameter stands for: its own, unless a parametrization holds it."""
    modules = context.modules
    if len(modules) > 2 and isinstance(context.owner, ParametrizationList):
        names = (name for name, module in modules[1].named_children() if module is context.owner)
        return modules[2], next(names, leaf)
    for suffix in ("_v", "_orig"):
        base = leaf.removesuffix(suffix)
        if base != leaf and stored(context.owner, base) is context.tensor:
            return context.owner, base
    return context.owner, leaf


_WRAPPED = ("base_layer", "linear", "original_module", "base_module", "module", "_orig_mod",
            "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # fmt: skip


_AROUND = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module, or the one it wraps, has a child or parameter of this name."""
    return name in module._modules or name in module._parameters or is_wrapper(module)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only stands around another one: FSDP1's, activation checkpointing's, torch.compile's."""
    return any(name in module._modules for name in _AROUND)


def _child(parent: object, name: str) -> object:
    """A child by attribute, through the wrappers that put a layer between."""
    found = getattr(parent, name, None)
    for wrapper in _AROUND:
        if found is None and isinstance(inner := getattr(parent, wrapper, None), nn.Module):
            return _child(inner, name)
    return found


def is_convolution(module: nn.Module) -> bool:
    """torch's own convolutions and what derives from them."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_dense(module: nn.Module) -> bool:
    """Whether a module's weight is a plain matrix whose output axis we know."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return any(n.endswith(("Linear", "Linear4bit", "Linear8bitLt")) or n == "Conv1D" for n in names)
