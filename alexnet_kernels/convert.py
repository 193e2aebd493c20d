"""Change the classes inside an existing model to ours, change them back, and say what runs as one operation and what not.

Nothing is moved, renamed, replaced or copied: a module whose type is exactly torch's changes its ``__class__``, so keys,
parameters, hooks, optimisers and wrappers stay. Convolutions, ``Linear`` and ReLU stay torch's own: they are fused by the
``FusedSequential`` that holds them (see ``nn``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from . import nn
from ._fusion import steps

M = TypeVar("M", bound=torch.nn.Module)

_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Sequential: nn.FusedSequential,
    torch.nn.LocalResponseNorm: nn.LocalResponseNorm,
    torch.nn.MaxPool2d: nn.MaxPool2d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()} | {nn.PixelConv2d: torch.nn.Conv2d}
_EXTRAS: dict[type[torch.nn.Module], tuple[str, ...]] = {  # attributes that torch's class has not
    nn.LocalResponseNorm: ("groups", "alpha_mode"),
    nn.PixelConv2d: ("mean", "scale", "channels", "_numbers"),
}


def convert(model: M) -> M:
    """Make ``model`` use this package's operations, in place; the same model is returned.

    Each ``Sequential``, ``LocalResponseNorm`` and ``MaxPool2d`` of exactly torch's type becomes ours, wherever it is: below
    a ``DistributedDataParallel`` or a compiled module too. Values, gradients, ``state_dict`` and behaviour stay; other
    classes, subclasses and scripted parts are left alone. To convert twice is to convert once.

    Raises:
        TypeError: ``model`` is not a module, or was made by ``torch.jit``.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> print(conversion_report(convert(model)))
    2 modules changed class, 1 run fuses, 1 layer does not
    changed class:
      (model): torch.nn.Sequential -> alexnet_kernels.nn.FusedSequential
      2: torch.nn.MaxPool2d -> alexnet_kernels.nn.MaxPool2d
    one operation:
      0, 1: conv2d_relu
    by themselves:
      2 (MaxPool2d): last in its Sequential
    """
    _check(model, "converted")
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
    return model


def revert(model: M) -> M:
    """Undo :func:`convert`, in place: every module that a class of torch can stand for has that class again.

    That holds for modules built as ours too: where it came from cannot be seen in a module. A ``PixelConv2d`` takes
    floating-point images alone from then on. Those that torch has no class for (``ConvReLU2d``, ``AlexNetStem``, an LRN with
    ``groups`` or ``alpha_mode="sum"``, ...) stay as they are.

    Raises:
        TypeError: ``model`` is not a module, or was made by ``torch.jit``.

    >>> model = torch.nn.Sequential(torch.nn.MaxPool2d(2))
    >>> type(revert(convert(model))) is torch.nn.Sequential
    True
    """
    _check(model, "reverted")
    for module in model.modules():
        if _is_revertible(module):
            for name in _EXTRAS.get(type(module), ()):
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)
                vars(module).pop(name, None)
            module.__class__ = _TORCHS[type(module)]
    return model


def _is_revertible(module: torch.nn.Module) -> bool:
    if type(module) is nn.LocalResponseNorm:
        return module.groups == 1 and module.alpha_mode == "mean"
    return type(module) in _TORCHS


def _check(model: object, verb: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model is a {type(model).__name__}: what torch.jit made cannot be {verb}, its code is fixed; start from the "
            "module it was made from. A converted model can be traced; to script one, revert first"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@dataclass(frozen=True)
class Change:
    """A module that has our class instead of torch's."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class FusedRun:
    """Modules, neighbours in one ``FusedSequential``, that run as ``operation`` when that is called."""

    names: tuple[str, ...]
    operation: str

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {self.operation}"


@dataclass(frozen=True)
class Unfused:
    """A convolution, ``Linear``, LRN or max pooling with which no run begins, and why."""

    name: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.type}): {self.reason}"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`conversion_report` found; ``str()`` is for people, ``to_json()`` for programs."""

    changed: tuple[Change, ...]
    fused: tuple[FusedRun, ...]
    unfused: tuple[Unfused, ...]

    def __str__(self) -> str:
        changed, fused, unfused = len(self.changed), len(self.fused), len(self.unfused)
        head = (
            f"{changed} {'module' if changed == 1 else 'modules'} changed class",
            f"{fused} {'run fuses' if fused == 1 else 'runs fuse'}",
            f"{unfused} {'layer does' if unfused == 1 else 'layers do'} not",
        )
        lines = [", ".join(head)]
        parts = {"changed class": self.changed, "one operation": self.fused, "by themselves": self.unfused}
        for title, entries in parts.items():
            lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def conversion_report(model: torch.nn.Module) -> ConversionReport:
    """What :func:`convert` changed in ``model``, which runs a call would fuse now, and what it would not, with the reason.

    Looks at the modules and runs nothing: whether a container is called, with what, and whether a model calls its children
    one by one instead, it cannot see. A hook added later changes the answer.

    Raises:
        TypeError: ``model`` is not a module, or was made by ``torch.jit``.
    """
    _check(model, "reported on")
    changed, fused, unfused = [], [], []
    if nn.FusedSequential._known.may_start(model):
        unfused.append(Unfused("", type(model).__name__, "not in a Sequential"))
    for path, module in model.named_modules():
        if _is_revertible(module):
            changed.append(Change(path, f"torch.nn.{_TORCHS[type(module)].__name__}", _qualified(type(module))))
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.FusedSequential):
            for step in steps(module):
                names = tuple(prefix + child for child in step.children)
                if step.op is not None:
                    fused.append(FusedRun(names, step.op))
                elif step.why_not is not None:
                    unfused.append(Unfused(names[0], type(module._modules[step.children[0]]).__name__, step.why_not))
        else:
            unfused += [Unfused(prefix + name, kind, reason) for name, kind, reason in _outside(module)]
    return ConversionReport(tuple(changed), tuple(fused), tuple(unfused))


def _outside(parent: torch.nn.Module) -> Iterator[tuple[str, str, str]]:
    """The layers that stand directly in ``parent``, which is no ``FusedSequential``."""
    if isinstance(parent, torch.jit.ScriptModule):
        reason = "scripted"
    elif type(parent) is torch.nn.Sequential:
        reason = "its Sequential is not converted"
    elif isinstance(parent, torch.nn.Sequential):
        reason = f"in a {type(parent).__name__}, a Sequential of its own class"
    else:
        reason = "not in a Sequential"
    for name, child in parent.named_children():
        if nn.FusedSequential._known.may_start(child):
            yield name, type(child).__name__, reason


def _qualified(kind: type) -> str:
    module = nn.__name__ if getattr(nn, kind.__qualname__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"
