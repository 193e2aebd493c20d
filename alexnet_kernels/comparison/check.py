"""Are the answers right: every group's output and every gradient of each contender against the same network in fp64.

Values are checked with dropout off: its masks differ between contenders by nature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from ..distributed import exchange
from ..geometry import LRN
from .contenders import Contender, OneDevice
from .stock import stock_alexnet

FORWARD, TRAINING = "forward", "training step"
TOTAL, PIXELS = "total", "uint8"
FACTOR = 4
FP32_ROUNDING = 2.0**-24
ROUNDING = {"fp32": FP32_ROUNDING, "tf32": 2.0**-11, "bf16": 2.0**-9, "fp16": 2.0**-11}  # the largest relative error


@dataclass(frozen=True)
class Error:
    """The relative L2 distance of one tensor from fp64, what is allowed, and the backends that made it."""

    value: float
    tensor: str
    allowed: float
    backend: str


Errors = dict[tuple[str, str, str], Error]  # by contender, group, run


def check(
    contenders: Sequence[Contender], inputs: Tensor, pixels: Tensor, dtype: str, progress: Callable[[str], None]
) -> tuple[Errors, tuple[exchange.Transfer, ...]]:
    """Errors by (contender, group, run) against an fp64 network with the same weights and inputs; what crossed meanwhile.

    ``inputs`` are ``pixels``, prepared.
    """
    truth = OneDevice("fp64", stock_alexnet(contenders[0].variant).to(inputs.device, torch.float64))
    truth.model.load_state_dict(contenders[0].model.state_dict())
    outputs, gradients = _values(truth, inputs.double())[:2]
    members = dict(_gradients_of(truth))
    progress(f"fp64 with the roundings of {dtype}")
    allowed = _allowed(truth, inputs.double(), dtype, outputs, gradients, members)
    errors: Errors = {}
    transfers: list[exchange.Transfer] = []
    for contender in contenders:
        progress(f"check: {contender.name}")
        with exchange.recording() as log:
            ours, grads, backends = _values(contender, inputs)
        transfers += log.transfers
        for group, expected in outputs.items():
            label = f"output of {group}" if group != TOTAL else "logits"
            distance = _distance(ours[group], expected)
            errors[contender.name, group, FORWARD] = Error(distance, label, allowed[group, FORWARD], backends[group])
        for group, names in members.items():
            far = {name: _distance(grads[name], gradients[name]) for name in names}
            worst = _worst(far)
            label, bound = f"gradient of {worst}", allowed[group, TRAINING]
            errors[contender.name, group, TRAINING] = Error(far[worst], label, bound, backends[group])
        errors |= _errors_from_pixels(contender, pixels, outputs[TOTAL], gradients, allowed)
    return errors, tuple(transfers)


def _errors_from_pixels(
    contender: Contender,
    pixels: Tensor,
    logits: Tensor,
    gradients: dict[str, Tensor],
    allowed: dict[tuple[str, str], float],
) -> Errors:
    """The whole network fed with the pixels themselves, held to the bounds of the prepared images' rows."""
    contender.model.zero_grad()
    with dispatch.recording() as used:
        ours = contender.from_pixels(pixels)
    backend = "+".join(sorted(used)) or "torch"
    ours.backward(_direction(ours))
    far = {name: _distance(g.detach().double(), gradients[name]) for name, g in contender.gradients().items()}
    worst = _worst(far)
    forward = Error(_distance(ours.detach().double(), logits), "logits from pixels", allowed[TOTAL, FORWARD], backend)
    training = Error(far[worst], f"gradient of {worst} from pixels", allowed[TOTAL, TRAINING], backend)
    return {(contender.name, PIXELS, FORWARD): forward, (contender.name, PIXELS, TRAINING): training}


def _direction(logits: Tensor) -> Tensor:
    """Which combination of the logits is differentiated: a fixed random one; a softmax would only blur the comparison."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)


def _worst(distances: dict[str, float]) -> str:
    return max(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])


def _allowed(
    truth: OneDevice,
    inputs: Tensor,
    dtype: str,
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
    members: dict[str, list[str]],
) -> dict[tuple[str, str], float]:
    """The relative L2 error allowed for each group: four times what the dtype's own roundings do to the fp64 network.

    The roundings are played out: Gaussian noise of their size is added to each layer's output in fp64. This measures how
    the network responds, its kinks included: where a value lies closer to a ReLU's zero or to an equal maximum than its
    error, the gradient takes the other side. Such flips are rare events, and one among n units moves a gradient by about
    ``sqrt(1/n)``; three in the smallest layer are allowed on top.
    """
    hooks = [module.register_forward_hook(hook) for module, hook in _roundings(truth, dtype)]
    noisy_outputs, noisy_gradients, _ = _values(truth, inputs)
    for handle in hooks:
        handle.remove()
    allowed = {(g, FORWARD): FACTOR * _distance(noisy_outputs[g], outputs[g]) for g in outputs}
    hidden = [facts.neurons for facts in truth.variant.layers[:-1] if facts.neurons]
    flips, worst = math.sqrt(3 / (len(inputs) * min(hidden))), 0.0
    for group in reversed(members):  # a flip changes the gradients of its own layer and of all before it
        if group != TOTAL:
            worst = max(worst, *(_distance(noisy_gradients[n], gradients[n]) for n in members[group]))
            allowed[group, TRAINING] = FACTOR * worst + (0.0 if group == truth.variant.groups[-1].name else flips)
    worst = max(worst, _distance(noisy_gradients["input"], gradients["input"]))
    allowed[TOTAL, TRAINING] = FACTOR * worst + flips
    return allowed


def _roundings(truth: OneDevice, dtype: str) -> Iterator[tuple[torch.nn.Module, Callable[..., Tensor]]]:
    """Each layer that computes, with a hook that adds its rounding errors, relative to the root mean square of its output:
    those of a sum of K products in fp32 and of storing input, weight and output in the dtype. Errors spread evenly up to
    ``u`` have the variance ``u²/3``, and variances add."""
    generator = torch.Generator(next(truth.model.parameters()).device).manual_seed(0)
    for facts, module in zip(truth.variant.layers, truth.model.steps(), strict=True):
        terms = facts.macs // facts.neurons if facts.neurons else facts.op.size if isinstance(facts.op, LRN) else 0
        if terms:
            unit = math.sqrt(terms * FP32_ROUNDING**2 / 3 + 3 * ROUNDING[dtype] ** 2 / 3)

            def hook(module: torch.nn.Module, args: object, output: Tensor, unit: float = unit) -> Tensor:
                noise = torch.empty_like(output).normal_(generator=generator)
                return output + noise * (unit * output.detach().square().mean().sqrt())

            yield module, hook


def _values(contender: Contender, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Every group's output, every gradient (the images' as ``"input"``), and the backends that ran, without dropout."""
    contender.model.eval().zero_grad()
    images = inputs.detach().clone().requires_grad_()
    outputs: dict[str, Tensor] = {}
    backends: dict[str, str] = {}
    state = contender.enter(images)
    for group in contender.variant.groups:
        with dispatch.recording() as used:
            state = contender.run_group(group.name, state)
        outputs[group.name] = contender.merged(state).detach().double()
        backends[group.name] = "+".join(sorted(used)) or "torch"
    logits = contender.merged(state)
    outputs[TOTAL] = logits.detach().double()
    ran = set(backends.values()) - {"torch"}
    backends[TOTAL] = "+".join(sorted(ran)) or "torch"
    logits.backward(_direction(logits))
    gradients = {"input": torch.zeros_like(images) if images.grad is None else images.grad, **contender.gradients()}
    return outputs, {name: g.detach().double() for name, g in gradients.items()}, backends


def _gradients_of(one: OneDevice) -> Iterator[tuple[str, list[str]]]:
    """The names of the gradients that belong to each group, and all of them for the total."""
    names = {id(p): name for name, p in one.model.named_parameters()}
    for group in one.variant.groups:
        pairs = zip(one.variant.layers, one.model.steps(), strict=True)
        modules = [module for facts, module in pairs if facts.group == group.name]
        yield group.name, [names[id(p)] for module in modules for p in module.parameters()]
    yield TOTAL, ["input", *names.values()]


def _distance(value: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((value.to(expected.device) - expected).norm()) / (scale or 1.0)
