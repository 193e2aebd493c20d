"""A network as data: groups of layers, and everything that can be counted from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from .layers import LRN, TOWERS, Conv, Dropout, Linear, MaxPool, Op, ReLU, Scope, Shape, SpatialNorm

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Group:
    """Operations that run as one fused unit: a weighted layer with what surrounds it. Reports have one row a group."""

    name: str
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Preprocess:
    """How the variant's network was fed: 8-bit pixels become ``(pixel * scale - mean) / std``, per channel."""

    mean: Triple
    std: Triple = (1.0, 1.0, 1.0)
    scale: float = 1.0
    channels: Literal["RGB", "BGR"] = "RGB"
    resize: int = 256
    squash: bool = False  # both sides to `resize` (Caffe); otherwise the shorter side, aspect kept

    @property
    def rgb(self) -> tuple[Triple, Triple]:
        """``mean`` and ``scale`` that say the same as ``(pixel - mean) * scale`` of R, G and B."""
        order = slice(None, None, -1 if self.channels == "BGR" else 1)
        mean = tuple(m / self.scale for m in self.mean)[order]
        factor = tuple(self.scale / s for s in self.std)[order]
        return mean, factor  # type: ignore[return-value]


@dataclass(frozen=True)
class LayerFacts:
    """One operation in its place: what goes in, what comes out, and what it costs for one image."""

    name: str
    group: str
    op: Op
    input: Shape
    output: Shape
    neurons: int = 0
    parameters: int = 0
    connections: int = 0
    macs: int = 0
    exchanged: bool = False  # on two devices its input must arrive from the other tower first
    preprocess: Preprocess | None = None  # how the images were prepared that it reads; None behind the first layer

    @property
    def formula(self) -> str:
        """How the side of the output map follows from the side of the input map; empty where it does not change."""
        return self.op.formula(self.input[1]) if isinstance(self.op, Conv | MaxPool) else ""


@dataclass(frozen=True)
class Exchange:
    """A transfer between the two devices before ``layer``; values are per image and direction, backward mirrors it."""

    layer: str
    values: int
    directions: int = 2

    def bytes(self, batch: int, itemsize: int = 4) -> int:
        return self.values * batch * itemsize


@dataclass(frozen=True)
class Variant:
    """A published network. ``paper.override(num_classes=10)`` makes a changed one."""

    name: str
    summary: str
    groups: tuple[Group, ...]
    preprocess: Preprocess
    input_size: tuple[int, int] = (227, 227)
    num_classes: int = 1000
    layers: tuple[LayerFacts, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_walk(self)))

    def override(
        self,
        *,
        num_classes: int | None = None,
        input_size: int | tuple[int, int] | None = None,
        lrn_scope: Scope | None = None,
        conv_groups: int | None = None,
        dropout: float | None = None,
    ) -> Variant:
        """The same network with other classes, input (side or ``(height, width)``), LRN scope, grouping or dropout."""
        if lrn_scope not in (None, "tower", "global"):
            raise ValueError(
                f"lrn_scope={lrn_scope!r} is not a scope: use 'tower' (inside a tower) or 'global' (all channels)"
            )
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if conv_groups not in (None, 1, TOWERS):
            raise ValueError(
                f"conv_groups={conv_groups} is not a grouping of AlexNet: {TOWERS} (a group a tower) or 1 (none)"
            )

        def change(op: Op) -> Op:
            if isinstance(op, LRN) and lrn_scope is not None:
                return replace(op, scope=lrn_scope)
            if isinstance(op, Conv) and conv_groups is not None and op.towered:
                return replace(op, groups=conv_groups)
            if isinstance(op, Dropout) and dropout is not None:
                return replace(op, p=dropout)
            return op

        return replace(
            self,
            groups=self._changed(change),
            num_classes=self.num_classes if num_classes is None else num_classes,
            input_size=_pair(input_size) if input_size is not None else self.input_size,
        )

    def narrowed(self, factor: int) -> Variant:
        """The same network with every layer but the classifier ``factor`` times narrower."""

        def change(op: Op) -> Op:
            if isinstance(op, Conv):
                return replace(op, out_channels=op.out_channels // factor)
            if isinstance(op, Linear) and op.out_features is not None:
                return replace(op, out_features=op.out_features // factor)
            return op

        return replace(self, groups=self._changed(change))

    def _changed(self, change: Callable[[Op], Op]) -> tuple[Group, ...]:
        return tuple(Group(g.name, tuple(map(change, g.ops))) for g in self.groups)

    @property
    def parameters(self) -> int:
        return sum(f.parameters for f in self.layers)

    @property
    def neurons(self) -> int:
        return sum(f.neurons for f in self.layers)

    @property
    def connections(self) -> int:
        return sum(f.connections for f in self.layers)

    @property
    def macs(self) -> int:
        return sum(f.macs for f in self.layers)

    def flops(self, *, training: bool = False) -> int:
        """Floating-point operations of one image: 2 a MAC; a training step adds dgrad and wgrad, but no dgrad for the image."""
        return 2 * (3 * self.macs - self.layers[0].macs if training else self.macs)

    def facts(self, group: str) -> tuple[LayerFacts, ...]:
        return tuple(f for f in self.layers if f.group == group)

    def group_bytes(self, group: str, batch: int, itemsize: int) -> int:
        """The least a fused group must move, forward: its input and output once an image, its parameters once a batch."""
        facts = self.facts(group)
        values = math.prod(facts[0].input) + math.prod(facts[-1].output)
        return itemsize * (batch * values + sum(f.parameters for f in facts))

    def device_parameters(self, device: int, fc8: str = "device0") -> int:
        """Parameters that live on device 0 or 1. Every layer is split by output, but fc8: whole on device 0, or by input."""
        check_fc8(fc8)
        total = 0
        for f in self.layers:
            if f is not self.layers[-1]:
                total += f.parameters // TOWERS
            elif fc8 == "split":
                total += f.macs // TOWERS + (self.num_classes if device == 0 else 0)
            elif device == 0:
                total += f.parameters
        return total

    def exchanges(self, fc8: str = "device0") -> tuple[Exchange, ...]:
        """What crosses between two devices in a forward pass, in order. A global LRN needs a halo of ``size//2`` channels."""
        check_fc8(fc8)
        found = []
        for f in self.layers:
            half = math.prod(f.input) // TOWERS
            if f is self.layers[-1]:
                found.append(Exchange(f.name, self.num_classes if fc8 == "split" else half, directions=1))
            elif f.exchanged:
                found.append(Exchange(f.name, half))
            elif isinstance(f.op, LRN) and f.op.scope == "global":
                found.append(Exchange(f.name, f.op.size // 2 * math.prod(f.input[1:])))
        return tuple(found)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"input_size={size!r} must be a side in pixels or (height, width)")
    return pair[0], pair[1]


def check_fc8(fc8: str) -> None:
    """Raise ``ValueError`` for anything but the two ways of placing fc8."""
    if fc8 not in ("device0", "split"):
        raise ValueError(f"fc8={fc8!r} is unknown: 'device0' (whole on the first device) or 'split' (by inputs)")


def _walk(variant: Variant) -> Iterator[LayerFacts]:
    """Each operation with its shapes and counts, from the image to the classes."""
    image: Shape = (3, *variant.input_size)
    shape = image
    for group in variant.groups:
        for op in group.ops:
            if isinstance(op, Linear) and op.out_features is None:
                op = replace(op, out_features=variant.num_classes)
            name = op.prefix + group.name.lstrip("convf")
            out = shape if isinstance(op, ReLU | LRN | SpatialNorm | Dropout) else op.output(shape)
            if min(out) < 1:
                raise ValueError(
                    f"input_size={variant.input_size} is too small for variant {variant.name!r}: "
                    f"{name} gets a {shape[1]}x{shape[2]} map and has no output; use a larger image"
                )
            prepared = variant.preprocess if shape is image else None
            facts = LayerFacts(name, group.name, op, shape, out, preprocess=prepared)
            if isinstance(op, Conv | Linear):
                neurons, fan_in = math.prod(out), op.macs_per_neuron(shape)
                facts = replace(
                    facts,
                    neurons=neurons,
                    parameters=(fan_in + 1) * out[0],
                    connections=(fan_in + 1) * neurons,
                    macs=fan_in * neurons,
                    exchanged=shape is not image and getattr(op, "groups", 1) == 1,
                )
            yield facts
            shape = out
