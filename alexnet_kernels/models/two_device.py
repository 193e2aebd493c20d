"""The network on two devices, as in 2012: one tower each, joined at conv3, fc6, fc7 and fc8.

Each tower has half of every layer's outputs. conv1, conv2, conv4, conv5, LRN and the dropout masks are local to a tower;
where the geometry says ``exchanged``, both towers read all inputs, so the halves cross first. Nothing else crosses: no
weight and no weight gradient. Between two exchanges each tower runs what ``nn.FusedSequential`` would run of its layers,
and the towers take turns operation by operation, so that one Python thread keeps both devices busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import geometry, nn
from ..distributed import exchange
from ..geometry import LRN, TOWERS, LayerFacts, Variant
from .alexnet import AlexNet, Network, layer, paths

FC8 = Literal["device0", "split"]
Modules = tuple[torch.nn.Module, ...]
Lanes = tuple[exchange.Lane, exchange.Lane]
Devices = tuple[str | torch.device, str | torch.device]


class Stretch(NamedTuple):
    """Layers up to the next exchange: the first, in front of which is theirs, and all as modules, those of each tower (of one
    tower alone where fc8 is whole on device 0)."""

    first: LayerFacts
    towers: tuple[Modules, ...]


class TwoDeviceAlexNet(torch.nn.Module):
    """A variant on two devices in one process; same images, same logits (on the first device) as :class:`AlexNet`.

    Args:
        variant, num_classes, **overrides: as for ``models.alexnet``; with one seed both give the same weights.
        devices: one device a tower; they may be the same one (``("cpu", "cpu")``; on one GPU each tower has a stream).
        fc8: ``"device0"``, whole on the first device as in the original; ``"split"``, each tower multiplies its own half
            of the inputs and only the partial logits cross.

    The ``state_dict`` has ``towers.0.`` and ``towers.1.`` before the names of :class:`AlexNet`; :func:`split_state` and
    :func:`merge_state` convert it bitwise. ``.to(device)`` moves both towers; the devices in force are those of the weights.

    Raises:
        ValueError: unknown variant, ``fc8`` or override; a device that does not exist; a layer of odd width.
    """

    def __init__(
        self,
        variant: str | Variant = "paper",
        num_classes: int | None = None,
        devices: Devices = ("cuda:0", "cuda:1"),
        fc8: FC8 = "device0",
        **overrides: object,
    ) -> None:
        super().__init__()
        geometry.check_fc8(fc8)
        targets = _check_devices(devices)
        self.variant = geometry.variant(variant, num_classes=num_classes, **overrides)
        _check_widths(self.variant)
        self.fc8: FC8 = fc8
        whole = AlexNet(self.variant).state_dict()
        self.towers = torch.nn.ModuleList(_tower(self.variant, index, fc8) for index in range(TOWERS))
        self.load_state_dict(split_state(whole, self.variant, fc8))
        for tower, device in zip(self.towers, targets, strict=True):
            tower.to(device)

    @classmethod
    def from_one_device(
        cls, model: AlexNet, devices: Devices = ("cuda:0", "cuda:1"), fc8: FC8 = "device0"
    ) -> TwoDeviceAlexNet:
        """The same network, weights and mode on two devices; as many classes as ``model`` has now, if its head was replaced.

        Raises:
            TypeError: ``model`` is no :class:`AlexNet` of this package.
            ValueError: as the constructor's.
        """
        if not isinstance(model, AlexNet):
            raise TypeError(
                f"model is {type(model).__module__}.{type(model).__name__}: an alexnet_kernels.models.AlexNet is needed, "
                "whose variant says how to divide it; load the weights into models.alexnet(...) first"
            )
        state = model.state_dict()
        *_, (name, path, _) = _weighted(model.variant)
        classes = _entry(state, f"{path}.weight", name).shape[0]
        made = cls(model.variant, classes, devices, fc8).to(next(model.parameters()).dtype)
        made.load_state_dict(split_state(state, made.variant, fc8))
        return made.train(model.training)

    def to_one_device(self, device: str | torch.device = "cpu") -> AlexNet:
        """The same network, weights and mode on one device."""
        made = AlexNet(self.variant).to(device, next(self.parameters()).dtype)
        made.load_state_dict(merge_state(self.state_dict(), self.variant, self.fc8))
        return made.train(self.training)

    @property
    def devices(self) -> tuple[torch.device, torch.device]:
        first, second = (next(tower.parameters()).device for tower in self.towers)
        return first, second

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` images (on any device, uint8 ones as in :class:`AlexNet`) to ``[N, num_classes]`` logits on the first
        device."""
        lanes = exchange.lanes(*self.devices)
        halves = self.receive(x, lanes)
        for stretch in self.stretches():
            halves = self.run(stretch, halves, lanes)
        return self.deliver(halves[0], lanes)

    def stretches(self, group: str | None = None) -> Iterator[Stretch]:
        """The network, or one group of it, from exchange to exchange."""
        layers, towers = self.variant.layers, [tower.steps() for tower in self.towers]  # type: ignore[operator]
        inside = [i for i, facts in enumerate(layers) if group in (None, facts.group)]
        starts = [i for i in inside if i == inside[0] or layers[i].exchanged or _is_across(layers[i])]
        for start, stop in itertools.pairwise((*starts, inside[-1] + 1)):
            modules = [tuple(steps[start:stop]) for steps in towers]
            yield Stretch(layers[start], tuple(filter(None, modules)))

    @staticmethod
    def receive(x: Tensor, lanes: Lanes) -> list[Tensor]:
        """The same images on both lanes."""
        images = []
        for lane in lanes:
            if lane.stream is not None:
                lane.wait_for(torch.cuda.current_stream(lane.device), x)
            with lane.on():
                images.append(x.to(lane.device, non_blocking=True))
        return images

    @staticmethod
    def deliver(y: Tensor, lanes: Lanes) -> Tensor:
        """The logits, for use on the caller's stream, which waits for both lanes."""
        for lane in lanes:
            if lane.stream is not None:
                current = torch.cuda.current_stream(lane.device)
                current.wait_stream(lane.stream)
                y.record_stream(current)
        return y

    def run(self, stretch: Stretch, halves: list[Tensor], lanes: Lanes) -> list[Tensor]:
        """A stretch on both towers, with the exchange it needs before (or, for a split fc8, after) it."""
        facts, towers = stretch
        if facts is self.variant.layers[-1] and self.fc8 == "split":
            partial = _in_turns(towers, halves, lanes)
            with lanes[0].on():
                return [partial[0] + exchange.pull(partial[1], facts.name, lanes, source=1)]
        if facts.exchanged:
            halves = [_join(halves, facts.name, lanes, tower) for tower in range(len(towers))]
        elif _is_across(facts):
            return _across(facts, towers, halves, lanes)
        return _in_turns(towers, halves, lanes)

    def extra_repr(self) -> str:
        return f"{self.variant.name!r}, fc8={self.fc8!r}"


def _is_across(facts: LayerFacts) -> bool:
    return isinstance(facts.op, LRN) and facts.op.scope == "global"


def _in_turns(towers: Sequence[Modules], inputs: Sequence[Tensor], lanes: Lanes) -> list[Tensor]:
    """What a ``FusedSequential`` of each tower's modules makes of its input, an operation of one, then one of the other."""
    out, at = list(inputs[: len(towers)]), [0] * len(towers)
    while any(at[i] < len(modules) for i, modules in enumerate(towers)):
        for i, modules in enumerate(towers):
            if at[i] < len(modules):
                with lanes[i].on():
                    out[i], at[i] = nn.fused_step(modules, at[i], out[i])
    return out


def _join(halves: list[Tensor], name: str, lanes: Lanes, tower: int) -> Tensor:
    """Both halves, in the one-device order, on ``tower``'s lane."""
    peer = exchange.pull(halves[1 - tower], name, lanes, source=1 - tower)
    with lanes[tower].on():
        return torch.cat((halves[0], peer) if tower == 0 else (peer, halves[1]), dim=1)


def _across(facts: LayerFacts, towers: Sequence[Modules], halves: list[Tensor], lanes: Lanes) -> list[Tensor]:
    """What begins with LRN over the channels of both towers. Each pulls the channels next to its own that LRN reaches, and drops
    them after the first operation: LRN, or LRN and the pooling that follows."""
    own = halves[0].shape[1]
    reach = min(facts.op.size // 2, own)  # type: ignore[union-attr]
    lower = exchange.pull(halves[1][:, :reach], facts.name, lanes, source=1)
    upper = exchange.pull(halves[0][:, own - reach :], facts.name, lanes, source=0)
    parts, kept = ((halves[0], lower), (upper, halves[1])), (slice(own), slice(-own, None))
    out, rest = [], []
    for modules, wide, mine, lane in zip(towers, parts, kept, lanes, strict=True):
        with lane.on():
            made, at = nn.fused_step(modules[:2], 0, torch.cat(wide, dim=1))
            out.append(made[:, mine])
            rest.append(modules[at:])
    return _in_turns(rest, out, lanes)


def _tower(variant: Variant, index: int, fc8: FC8) -> Network:
    last = variant.layers[-1]

    def make(facts: LayerFacts, towers: int) -> torch.nn.Module:
        if facts is not last:
            return layer(facts, towers)
        width = facts.input[0] // (TOWERS if fc8 == "split" else 1)
        return torch.nn.Linear(width, facts.output[0], bias=index == 0)

    return Network(variant, make, TOWERS, leave_out=(last.name,) if fc8 == "device0" and index == 1 else ())


def split_state(state: Mapping[str, Tensor], variant: Variant, fc8: FC8 = "device0") -> dict[str, Tensor]:
    """A one-device ``state_dict`` as a two-device one: every tensor in halves of dim 0, fc8 as ``fc8`` says."""
    geometry.check_fc8(fc8)
    divided: dict[str, Tensor] = {}
    for name, path, last in _weighted(variant):
        weight, bias = _entry(state, f"{path}.weight", name), _entry(state, f"{path}.bias", name)
        if not last:
            weights, biases = list(weight.chunk(TOWERS)), list(bias.chunk(TOWERS))
        elif fc8 == "split":
            weights, biases = list(weight.chunk(TOWERS, dim=1)), [bias]
        else:
            weights, biases = [weight], [bias]
        divided |= {f"towers.{i}.{path}.weight": w.clone() for i, w in enumerate(weights)}
        divided |= {f"towers.{i}.{path}.bias": b.clone() for i, b in enumerate(biases)}
    return divided


def merge_state(state: Mapping[str, Tensor], variant: Variant, fc8: FC8 = "device0") -> dict[str, Tensor]:
    """The inverse of :func:`split_state`; the result lies on the first tower's device."""
    geometry.check_fc8(fc8)
    merged: dict[str, Tensor] = {}
    for name, path, last in _weighted(variant):
        for kind in ("weight", "bias"):
            parts = [_entry(state, f"towers.0.{path}.{kind}", name)]
            if not last or (fc8 == "split" and kind == "weight"):
                parts.append(_entry(state, f"towers.1.{path}.{kind}", name).to(parts[0].device))
            merged[f"{path}.{kind}"] = torch.cat(parts, dim=1 if last and kind == "weight" else 0)
    return merged


def _weighted(variant: Variant) -> Iterator[tuple[str, str, bool]]:
    for facts, path in zip(variant.layers, paths(variant), strict=True):
        if facts.parameters and path is not None:
            yield facts.name, path, facts is variant.layers[-1]


def _entry(state: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in state:
        raise ValueError(
            f"state has no {key!r} ({name}); it belongs to another variant or form: keys begin {list(state)[:3]}"
        )
    return state[key]


def _check_devices(devices: Devices) -> tuple[torch.device, torch.device]:
    if len(devices) != TOWERS:
        raise ValueError(f"devices={devices!r} must name two devices, one a tower; ('cpu', 'cpu') puts both on one")
    first, second = (torch.device(d) for d in devices)
    for device in (first, second):
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            here = "('cuda:0', 'cuda:0')" if count else "('cpu', 'cpu')"
            raise ValueError(
                f"devices={devices!r}: {device} does not exist, {count} CUDA devices are visible; use devices={here}"
            )
    return tuple(torch.device("cuda", d.index or 0) if d.type == "cuda" else d for d in (first, second))  # type: ignore[return-value]


def _check_widths(variant: Variant) -> None:
    for facts in variant.layers[:-1]:
        if facts.parameters and facts.output[0] % TOWERS:
            raise ValueError(
                f"variant {variant.name!r} has {facts.output[0]} outputs in {facts.name}; two towers need an even number"
            )
