"""Three ways of running one network, behind one interface: a state goes from fused group to fused group.

A state is the list of tensors between two groups: one on one device, a half from each tower on two.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..distributed import exchange
from ..geometry import Variant
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

    def enter(self, images: Tensor) -> State: ...
    def run_group(self, group: str, state: State) -> State: ...
    def merged(self, state: State) -> Tensor: ...
    def gradients(self) -> dict[str, Tensor]: ...


class OneDevice:
    """An :class:`AlexNet`: ours or stock."""

    def __init__(self, name: str, model: AlexNet) -> None:
        self.name, self.model, self.variant = name, model, model.variant

    def enter(self, images: Tensor) -> State:
        return [images.to(next(self.model.parameters()).device)]

    def run_group(self, group: str, state: State) -> State:
        (x,) = state
        for facts, module in zip(self.variant.layers, self.model.steps(), strict=True):
            if facts.group == group:
                x = module(x)
        return [x]

    def merged(self, state: State) -> Tensor:
        return state[0]

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class TwoDevices:
    """A :class:`TwoDeviceAlexNet`; a group begins with the exchange it needs."""

    def __init__(self, name: str, model: TwoDeviceAlexNet) -> None:
        self.name, self.model, self.variant = name, model, model.variant

    def enter(self, images: Tensor) -> State:
        return self.model.receive(images, exchange.lanes(*self.model.devices))

    def run_group(self, group: str, state: State) -> State:
        lanes = exchange.lanes(*self.model.devices)
        for facts, modules in self.model.walk():
            if facts.group == group:
                state = self.model.step(facts, modules, state, lanes)
        return state

    def merged(self, state: State) -> Tensor:
        for device in self.model.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return torch.cat([half.to(state[0].device) for half in state], dim=1)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return merge_state(found, self.variant, self.model.fc8)
