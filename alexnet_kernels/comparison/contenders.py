"""Three ways of running one network, behind one interface: a state goes from fused group to fused group.

A state is the list of tensors between two groups: one on one device, a half from each tower on two. A group runs as its model
runs it, as one operation where that would; only what a model runs across their border (conv3 to conv5) is divided.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..distributed import exchange
from ..geometry import Variant
from ..images import prepare
from ..models import AlexNet, TwoDeviceAlexNet, merge_state

State = list[Tensor]


class Contender(Protocol):
    """A network that can be run group by group, and whose states and gradients can be compared with another's."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def variant(self) -> Variant: ...

    def from_pixels(self, pixels: Tensor) -> Tensor: ...
    def enter(self, images: Tensor) -> State: ...
    def run_group(self, group: str, state: State) -> State: ...
    def merged(self, state: State) -> Tensor: ...
    def gradients(self) -> dict[str, Tensor]: ...


class OneDevice:
    """An :class:`AlexNet`: ours, or the stock one, whose pixels are prepared in front of it."""

    def __init__(self, name: str, model: AlexNet, *, takes_pixels: bool = True) -> None:
        self.name, self.model, self.variant, self.takes_pixels = name, model, model.variant, takes_pixels
        modules: dict[str, list[torch.nn.Module]] = {}
        for facts, module in zip(model.variant.layers, model.steps(), strict=True):
            modules.setdefault(facts.group, []).append(module)
        self._groups = {group: type(model.features)(*members) for group, members in modules.items()}

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """The logits of uint8 images in the host's memory, from their copying on."""
        weight = next(self.model.parameters())
        there = pixels.to(weight.device, non_blocking=True)
        return self.model(there if self.takes_pixels else prepare(there, self.variant.preprocess, weight.dtype))

    def enter(self, images: Tensor) -> State:
        return [images.to(next(self.model.parameters()).device)]

    def run_group(self, group: str, state: State) -> State:
        return [self._groups[group](*state)]

    def merged(self, state: State) -> Tensor:
        return state[0]

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class TwoDevices:
    """A :class:`TwoDeviceAlexNet`; a group begins with the exchange it needs."""

    def __init__(self, name: str, model: TwoDeviceAlexNet) -> None:
        self.name, self.model, self.variant = name, model, model.variant

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

    def enter(self, images: Tensor) -> State:
        return self.model.receive(images, exchange.lanes(*self.model.devices))

    def run_group(self, group: str, state: State) -> State:
        lanes = exchange.lanes(*self.model.devices)
        for stretch in self.model.stretches(group):
            state = self.model.run(stretch, state, lanes)
        return state

    def merged(self, state: State) -> Tensor:
        for device in self.model.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return torch.cat([half.to(state[0].device) for half in state], dim=1)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return merge_state(found, self.variant, self.model.fc8)
