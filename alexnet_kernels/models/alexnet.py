"""The network on one device, built from ``geometry``: ``features``, (``avgpool``), ``classifier``, as torchvision names them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import geometry, nn
from ..geometry import Conv, LayerFacts, Variant

Layer = Callable[[LayerFacts, int], torch.nn.Module]


def layer(facts: LayerFacts, towers: int = 1) -> torch.nn.Module:
    """The module of one operation, or a tower's share of it when the network is divided among ``towers`` devices.

    A tower has its share of every layer's outputs. It sees its own share of the inputs where the layer is grouped, and all
    of them where the geometry says that they are exchanged.
    """
    op = facts.op
    match op:
        case Conv():
            kind: type[torch.nn.Conv2d] = nn.CeilConv2d if op.ceil_mode else torch.nn.Conv2d
            pixels: dict[str, object] = {}
            if facts.preprocess is not None:
                kind = nn.CeilConv2d if op.ceil_mode else nn.PixelConv2d
                mean, scale = facts.preprocess.rgb
                pixels = {"mean": mean, "scale": scale, "channels": facts.preprocess.channels}
            grouped = towers if op.groups > 1 else 1
            conv = kind(
                facts.input[0] // grouped,
                op.out_channels // towers,
                op.kernel,
                op.stride,
                op.padding,
                groups=op.groups // grouped,
                **pixels,  # type: ignore[arg-type]
            )
            return _initialise(conv, op.std, op.bias)
        case geometry.Linear():
            return _initialise(torch.nn.Linear(facts.input[0], facts.output[0] // towers), op.std, op.bias)
        case geometry.LRN():
            groups = max(1, op.groups // towers)
            return nn.LocalResponseNorm(op.size, op.alpha, op.beta, op.k, groups=groups, alpha_mode=op.alpha_mode)
        case geometry.SpatialNorm():
            return nn.SpatialResponseNorm(op.size, op.alpha, op.beta, op.k)
        case geometry.MaxPool():
            return torch.nn.MaxPool2d(op.kernel, op.stride)
        case geometry.AdaptiveAvgPool():
            return torch.nn.AdaptiveAvgPool2d(op.size)
        case geometry.Dropout():
            return torch.nn.Dropout(op.p)
        case geometry.ReLU():
            return torch.nn.ReLU(inplace=True)
        case geometry.Flatten():
            return torch.nn.Flatten()


def _initialise(module: torch.nn.Conv2d | torch.nn.Linear, std: float | None, bias: float | None) -> torch.nn.Module:
    if std is not None:
        torch.nn.init.normal_(module.weight, std=std)
    if bias is not None and module.bias is not None:
        torch.nn.init.constant_(module.bias, bias)
    return module


def paths(variant: Variant) -> tuple[str | None, ...]:
    """Where each of ``variant.layers`` stands in the module tree (``"features.0"``); None for the flattening in between."""
    found: list[str | None] = []
    part, index = "features", 0
    for facts in variant.layers:
        if isinstance(facts.op, geometry.Flatten):
            found.append(None)
            part, index = "classifier", 0
        elif isinstance(facts.op, geometry.AdaptiveAvgPool):
            found.append("avgpool")
        else:
            found.append(f"{part}.{index}")
            index += 1
    return tuple(found)


class Network(torch.nn.Module):
    """The modules of a variant, or of one tower of it, under torchvision's names. ``steps`` is ``variant.layers`` in modules."""

    avgpool: torch.nn.Module

    def __init__(self, variant: Variant, make: Layer = layer, towers: int = 1, leave_out: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.variant = variant
        parts: dict[str, list[torch.nn.Module]] = {}
        for facts, path in zip(variant.layers, paths(variant), strict=True):
            if path is not None and facts.name not in leave_out:
                parts.setdefault(path.split(".")[0], []).append(make(facts, towers))
        self.features = nn.FusedSequential(*parts["features"])
        if "avgpool" in parts:
            (self.avgpool,) = parts["avgpool"]
        self.classifier = nn.FusedSequential(*parts["classifier"])

    def steps(self) -> list[torch.nn.Module]:
        """The modules in the order of ``variant.layers``."""
        pooled = [self.avgpool] if hasattr(self, "avgpool") else []
        return [*self.features, *pooled, _FLATTEN, *self.classifier]


_FLATTEN = torch.nn.Flatten()


class AlexNet(Network):
    """A variant on one device; ``[N, 3, H, W]`` images to ``[N, num_classes]`` logits.

    Floating-point images are prepared as ``variant.preprocess`` says; uint8 ones are RGB pixels, in either memory format, and
    are prepared so on the way into conv1.

    Two towers are two groups of channels here: grouped convolutions, and LRN inside a group where the variant says so.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if hasattr(self, "avgpool"):
            x = self.avgpool(x)
        return self.classifier(torch.flatten(x, 1))


def alexnet(
    variant: str | Variant = "paper", num_classes: int | None = None, *, layers: Layer = layer, **overrides: object
) -> AlexNet:
    """AlexNet on one device, newly initialised as the variant's authors did.

    Args:
        variant: a name from ``geometry.VARIANTS`` (``paper``, ``source2012``, ``caffe``, ``caffenet``, ``torchvision``,
            ``one_gpu``, ``tiny``) or a ``Variant``.
        num_classes: outputs of fc8; the variant's own (1000) by default.
        layers: makes the module of each operation; ours by default.
        **overrides: ``input_size``, ``lrn_scope``, ``conv_groups``, ``dropout``, as ``Variant.override`` takes them.

    Raises:
        ValueError: unknown variant, or an override that does not fit.

    >>> sum(p.numel() for p in alexnet("paper").parameters())
    60965224
    """
    return AlexNet(geometry.variant(variant, num_classes=num_classes, **overrides), layers)
