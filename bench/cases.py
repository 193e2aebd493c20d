"""What is measured: the layers and fused groups of a network, forward and backward, counted and drawn from ``geometry``.

A :class:`Unit` is a run of layers that is timed as one thing, a :class:`Problem` is a unit with a pass, a track and a batch.
Flattening and dropout are left out of every unit: the first is a view, the second draws at random and cannot be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from alexnet_kernels import geometry
from alexnet_kernels.geometry import LRN, Conv, Dropout, Flatten, LayerFacts, Linear, MaxPool, ReLU, Variant

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
# A precision track: results of two tracks are never compared with each other.
TRACKS = {
    "fp32": torch.float32,  # strict: no TF32 anywhere
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "amp": torch.float32,  # autocast to bf16 around fp32 tensors
}
BATCHES = {"cuda": (256, 128, 32, 1, 1024), "cpu": (16, 1)}  # in order of importance
CPU_TRACKS = ("fp32", "bf16")


@contextmanager
def precision(track: str) -> Iterator[None]:
    """Every flag that a track depends on, set for all contenders alike and put back afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    allow = track == "tf32"
    flags = {
        "allow_tf32": allow,
        "allow_fp16_reduced_precision_reduction": False,
        "allow_bf16_reduced_precision_reduction": False,
    }
    before = {name: getattr(matmul, name) for name in flags}
    with cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=False, allow_tf32=allow):
        try:
            for name, value in flags.items():
                setattr(matmul, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(matmul, name, value)


@dataclass(frozen=True)
class Unit:
    """Consecutive layers of one group, timed together."""

    variant: str
    name: str
    facts: tuple[LayerFacts, ...]

    @property
    def first(self) -> bool:
        """It begins with the image, which needs no gradient."""
        return self.facts[0].name == geometry.variant(self.variant).layers[0].name

    @property
    def input(self) -> tuple[int, int, int]:
        return self.facts[0].input

    @property
    def output(self) -> tuple[int, int, int]:
        return self.facts[-1].output

    @property
    def kind(self) -> str:
        """``"conv+relu"``, ``"lrn"``, ``"pool"``, ``"lrn+pool"``, ``"linear+relu"`` ... in the order of the layers."""
        names = {Conv: "conv", ReLU: "relu", LRN: "lrn", MaxPool: "pool", Linear: "linear"}
        return "+".join(names.get(type(f.op), type(f.op).__name__.lower()) for f in self.facts)

    def op(self, kind: type) -> object:
        """The only operation of a kind."""
        (found,) = (f.op for f in self.facts if isinstance(f.op, kind))
        return found


@dataclass(frozen=True)
class Problem:
    """A unit, which pass of it, in which precision track, for how many images, where."""

    unit: Unit
    run: Pass
    track: str
    batch: int
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"{self.unit.variant}/{self.unit.name}/{self.run}/{self.track}/{self.batch}"

    @property
    def dtype(self) -> torch.dtype:
        return TRACKS[self.track]

    @property
    def flops(self) -> int:
        """2 a multiply-accumulate; backward adds up dgrad and wgrad, but no dgrad for the image. Nothing else is counted."""
        macs = sum(f.macs for f in self.unit.facts)
        if self.run == "forward":
            return 2 * macs * self.batch
        return 2 * (macs if self.unit.first else 2 * macs) * self.batch

    @property
    def output_dtype(self) -> torch.dtype:
        """Under autocast what multiplies matrices gives bf16; normalisation and pooling by themselves keep their input's type."""
        return torch.bfloat16 if self.track == "amp" and any(f.macs for f in self.unit.facts) else self.dtype

    @property
    def bytes_read(self) -> int:
        """The least a pass must read, each tensor once: all that its own set of buffers has to bring into the caches.

        Forward: input and parameters. Backward: the output's gradient, parameters, and the input (a pooling by itself needs
        one byte an output instead: which of the window was largest), these as forward left them, cast under autocast. A
        ReLU's mask, a bit a value, is not counted.
        """
        values_in, values_out, parameters = self._values
        if self.run == "forward":
            return self.dtype.itemsize * (self.batch * values_in + parameters)
        size = self.output_dtype.itemsize
        saved = values_out if self.unit.kind == "pool" else size * values_in
        return self.batch * (size * values_out + saved) + size * parameters

    @property
    def bytes(self) -> int:
        """The least the fused unit must move: what it reads, and the output, or the gradients of the parameters and of the
        input, unless that is the image."""
        values_in, values_out, parameters = self._values
        if self.run == "forward":
            return self.bytes_read + self.output_dtype.itemsize * self.batch * values_out
        return self.bytes_read + self.dtype.itemsize * ((0 if self.unit.first else self.batch * values_in) + parameters)

    @property
    def _values(self) -> tuple[int, int, int]:
        """Of an image: input and output; of the unit: parameters."""
        unit = self.unit
        return math.prod(unit.input), math.prod(unit.output), sum(f.parameters for f in unit.facts)

    @cached_property
    def peak_track(self) -> str:
        """The matmul ceiling that this track is held against."""
        return {"amp": "bf16"}.get(self.track, self.track)

    def autocast(self) -> AbstractContextManager[object]:
        if self.track == "amp":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()


def units(variant: str | Variant = "paper") -> tuple[Unit, ...]:
    """Every unit of a network: weighted layers with their ReLU, LRN, pooling, LRN with pooling, and whole groups."""
    found: list[Unit] = []
    network = geometry.variant(variant)
    for group in network.groups:
        facts = tuple(f for f in network.facts(group.name) if not isinstance(f.op, Flatten | Dropout))
        made: list[tuple[LayerFacts, ...]] = []
        for i, fact in enumerate(facts):
            after = facts[i + 1] if i + 1 < len(facts) else None
            if isinstance(fact.op, Conv | Linear):
                made.append((fact, after) if after is not None and isinstance(after.op, ReLU) else (fact,))
            elif not isinstance(fact.op, ReLU):
                made.append((fact,))
            if isinstance(fact.op, LRN) and after is not None and isinstance(after.op, MaxPool):
                made.append((fact, after))
        if facts not in made:
            made.append(facts)
        for run in made:
            name = f"{group.name} group" if run == facts and len(run) > 2 else "+".join(f.name for f in run)
            found.append(Unit(network.name, name, run))
    return tuple(found)


def problems(
    device: str = "cpu",
    *,
    variant: str = "paper",
    tracks: tuple[str, ...] | None = None,
    batches: tuple[int, ...] | None = None,
) -> tuple[Problem, ...]:
    """All problems of a device, the most important first: batch by batch, then track, then pass, then layer."""
    kind = torch.device(device).type
    if tracks is None:
        tracks = CPU_TRACKS if kind == "cpu" else ("bf16", "tf32", "fp32", "fp16", "amp")
    return tuple(
        Problem(unit, run, track, batch, device)
        for batch in batches or BATCHES[kind]
        for track in tracks
        for run in PASSES
        for unit in units(variant)
        if kind == "cuda" or track == "fp32" or run == "forward"  # half types on a CPU are for inference
    )


@dataclass
class Tensors:
    """One set of buffers: input, output gradient and parameters of a problem, the same values for every contender."""

    x: Tensor
    grad: Tensor
    weights: list[Tensor]  # weight, bias

    def copy(self) -> Tensors:
        return Tensors(self.x.clone(), self.grad.clone(), [w.clone() for w in self.weights])

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(self.x.to(dtype), self.grad.to(dtype), [w.to(dtype) for w in self.weights])

    def channels_last(self) -> Tensors:
        def moved(t: Tensor) -> Tensor:
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

        return Tensors(moved(self.x), moved(self.grad), [moved(w) for w in self.weights])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.x, self.grad, *self.weights))


def _shape(shape: tuple[int, int, int], batch: int) -> tuple[int, ...]:
    return (batch, shape[0]) if shape[1:] == (1, 1) else (batch, *shape)


def tensors(problem: Problem, seed: int = 0) -> Tensors:
    """Random, contiguous tensors: a whitened image for the first layer, otherwise values after a ReLU (half of them zeros);
    He-initialised weights, small biases; gradients with mean 0."""
    device = torch.device(problem.device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    unit = problem.unit
    flat = isinstance(unit.facts[0].op, Linear)
    size_in = (math.prod(unit.input), 1, 1) if flat else unit.input
    x = normal(*_shape(size_in, problem.batch))
    # 20: the size of activations whose LRN does something; an image's deviation is about 60
    x = x * 60 if unit.first else x.relu_() * (20 if unit.kind in ("lrn", "lrn+pool") else 1)
    grad = normal(*_shape(unit.output, problem.batch))
    weights: list[Tensor] = []
    for f in unit.facts:
        if isinstance(f.op, Conv):
            shape = (f.output[0], f.input[0] // f.op.groups, f.op.kernel, f.op.kernel)
        elif isinstance(f.op, Linear):
            shape = (f.output[0], math.prod(f.input))
        else:
            continue
        weights += [normal(*shape) * (2 / math.prod(shape[1:])) ** 0.5, normal(shape[0]) * 0.1]
    return Tensors(x, grad, weights).to(problem.dtype)
