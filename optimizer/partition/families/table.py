"""The rows of the table of families, and how they find parameters in a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..heads import ask, sources
from ..roles import Anatomy, Part, Role


@dataclass(frozen=True)
class Context:
    """A parameter and the modules around it: the only input of a maker.

    Attributes:
        tensor: the parameter.
        owner: the module that the parameter is a direct member of.
        modules: the module that the family matched, then its ancestors, innermost first.
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

        Linear layers are (out, in), Conv1D of transformers is (in, out), and convolutions are (out, in, ...). Any
        other tensor of more than two axes is a stack of (out, in) matrices, one per expert or codebook.
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
        """Return an anatomy whose parts lie along the output axis.

        Args:
            parts: the parts, in order.
            why: the reason shown by ``explain``.
            repeat: how often the sequence of parts repeats.
        """
        leading, axis, in_axis = self.frame
        return Anatomy(self.shape, tuple(parts), why, axis=axis, in_axis=in_axis, leading=leading, repeat=repeat)

    def plain(self, role: Role, why: str) -> Anatomy:
        """Return an anatomy with a single part: all output units have the same role."""
        return self.anatomy((Part(role, self.outputs),), why)

    def ask(self, *names: str) -> int:
        """Return the first of these attributes, a positive integer, of the module, its configuration or an ancestor.

        Raises:
            ValueError: none of the modules has any of these attributes.
        """
        value = ask(self.modules, names)
        if value is None:
            raise ValueError(
                f"{type(self.modules[0]).__name__} and the modules around it have none of the attributes "
                f"{', '.join(names)}, which determine the layout of this weight; set one on the module or its "
                "configuration"
            )
        return value

    def number(self, name: str) -> int:
        """Return an integer attribute, which may be zero, of the nearest module or configuration that has it.

        Raises:
            ValueError: none of the modules has the attribute.
        """
        for source in sources(self.modules):
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return self.ask(name)

    def flag(self, name: str) -> bool:
        """Return the truth value of an attribute of the module, otherwise of its ``config``; False without either."""
        module = self.modules[0]
        return bool(getattr(module, name, getattr(getattr(module, "config", None), name, False)))

    def rows_of(self, paths: Sequence[str]) -> int | None:
        """Return the output size of the first of these parameters below the module that exists; None without any."""
        for path in paths:
            target = resolve(self.modules[0], path)
            if target is not None:
                owner, tensor = target
                return Context(tensor, owner, self.modules).outputs
        return None


Maker = Callable[[Context, str], Anatomy]
"""A function that describes a parameter, given its context and the reason to show."""


@dataclass(frozen=True)
class Family:
    """One row of the table: a kind of module, and what its parameters do.

    Attributes:
        why: the reason shown by ``explain``.
        params: parameter path below the module -> maker. The path of a sub-module means its weight.
        classes: class names, one of which the module or one of its base classes must have; empty for any class.
        children: paths of sub-modules or parameters that must all exist.
        library: the package in which the class must be defined; None for any.
        fused: whether the layout of a fused tensor is guessed from its name. Such a row never matches classes of
            transformers, because there the same name is used for several layouts.
    """

    why: str
    params: dict[str, Maker]
    classes: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    library: str | None = None
    fused: bool = field(default=False)

    def claims(self, module: nn.Module) -> dict[str, Maker]:
        """Return parameter path -> maker for a module that matches."""
        return self.params

    def matches(self, module: nn.Module) -> bool:
        """Whether this row describes the module."""
        if self.classes and not any(
            cls.__name__ in self.classes and self.library in (None, cls.__module__.split(".")[0])
            for cls in type(module).__mro__
        ):
            return False
        if self.fused and type(module).__module__.startswith("transformers."):
            return False
        if self.children and not _has(module, self.children[0].partition(".")[0]):
            return False  # a quick test that settles most cases
        return all(resolve(module, child) is not None for child in self.children)


def resolve(module: nn.Module, path: str) -> tuple[nn.Module, Tensor] | None:
    """Return (owner, parameter) at a dotted path below a module; None if there is no such parameter.

    The path of a sub-module means its ``weight``. If the sub-module wraps a layer named ``linear``, ``base_layer``,
    ``base_module`` or ``original_module``, that layer is used instead, so that projections wrapped by PEFT, DDP or
    activation checkpointing are found.
    """
    target: object = module
    for name in path.removesuffix(".weight").split("."):
        owner, target = target, _child(target, name)
    if isinstance(target, nn.Module):
        # Adapter layers and FSDP1 also expose a ``weight``, but the class of the inner layer determines its axes.
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
    """Return the parameter with the rows and columns of a module's tensor; None if there is none.

    This is the tensor itself unless it is parametrized. A parametrization (``torch.nn.utils.parametrize``, or the
    older ``weight_norm`` and ``spectral_norm``) replaces the parameter by others, from which the tensor is computed.
    Then it is the one with the shape of the tensor, for example the direction in weight normalisation.

    Args:
        module: the module.
        leaf: the name of the tensor in the module.
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
    """Return the (module, name) of the tensor that a parametrization computes from a parameter.

    Without a parametrization, it is the parameter's own module and name.

    Args:
        context: the parameter and the modules around it.
        leaf: the parameter's name in the module that owns it.
    """
    modules = context.modules
    if len(modules) > 2 and isinstance(context.owner, ParametrizationList):
        names = (name for name, module in modules[1].named_children() if module is context.owner)
        return modules[2], next(names, leaf)
    for suffix in ("_v", "_orig"):
        base = leaf.removesuffix(suffix)
        if base != leaf and stored(context.owner, base) is context.tensor:
            return context.owner, base
    return context.owner, leaf


_WRAPPED = (
    "base_layer",
    "linear",
    "original_module",
    "base_module",
    "module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)
_AROUND = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module may have a child or parameter of this name; always True for wrappers."""
    return name in module._modules or name in module._parameters or is_wrapper(module)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a wrapper of FSDP1, activation checkpointing or torch.compile around another module."""
    return any(name in module._modules for name in _AROUND)


def _child(parent: object, name: str) -> object:
    """Return an attribute of a module, or of the module that it wraps; None if neither has it."""
    child = getattr(parent, name, None)
    for wrapper in _AROUND:
        if child is None and isinstance(inner := getattr(parent, wrapper, None), nn.Module):
            return _child(inner, name)
    return child


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions or derived from one."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a dense layer, whose weight is a matrix with a known output axis."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return any(n.endswith(("Linear", "Linear4bit", "Linear8bitLt")) or n == "Conv1D" for n in names)
