"""The exchange between two towers in one process: lanes (a device and a stream), and tensors pulled from one to the other.

As in 2012 the consumer pulls: a tensor that a tower made on its own lane becomes usable on the other's. Autograd mirrors
it: the gradient goes back to the lane that made the tensor and is summed there with what its own tower contributed. Two
lanes on one GPU are two streams; on two GPUs they are the devices' current streams, between which torch's copies
synchronise; on CPUs they are names only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lane:
    """Where one tower runs."""

    device: torch.device
    stream: torch.cuda.Stream | None = None

    def on(self) -> contextlib.AbstractContextManager[object]:
        """Context in which this lane's work is queued."""
        if self.stream is not None:
            return torch.cuda.stream(self.stream)
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def wait_for(self, stream: torch.cuda.Stream | None, *tensors: Tensor) -> None:
        """Start nothing more before ``stream`` has made ``tensors``, and keep their memory until this lane is done."""
        if self.stream is not None and stream is not None:
            self.stream.wait_stream(stream)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)


@functools.lru_cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def lanes(first: torch.device, second: torch.device) -> tuple[Lane, Lane]:
    """The lanes of two towers; on one and the same GPU each gets a stream of its own."""
    if first == second and first.type == "cuda":
        one, other = _streams(first)
        return Lane(first, one), Lane(second, other)
    return Lane(first), Lane(second)


@dataclass(frozen=True)
class Transfer:
    """One tensor that crossed (or would have, where both lanes share a device): before which layer, which way, how much."""

    layer: str
    source: int
    target: int
    bytes: int
    backward: bool


@dataclass
class Log:
    """The transfers of a ``with recording() as log`` block, in order."""

    transfers: list[Transfer] = field(default_factory=list)

    def bytes(self, *, backward: bool = False) -> int:
        """Bytes that crossed in the forward (or the backward) direction of the network, both ways together."""
        return sum(t.bytes for t in self.transfers if t.backward == backward)


_log: ContextVar[Log | None] = ContextVar("alexnet_kernels_exchanges", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Log]:
    """Record every exchange inside the block, its backward too if that runs later; compiled code is not seen."""
    log = Log()
    token = _log.set(log)
    try:
        yield log
    finally:
        _log.reset(token)


def pull(x: Tensor, layer: str, lanes: tuple[Lane, Lane], source: int) -> Tensor:
    """``x``, made on lane ``source``, for use on the other lane; its gradient finds its own way back."""
    target = 1 - source
    here, there = lanes[target], lanes[source]
    if here.device == there.device:
        here.wait_for(there.stream, x)
        moved = x.view_as(x)
    else:
        with there.on():
            moved = x.to(here.device, non_blocking=here.device.type == "cuda")
    if not torch.compiler.is_compiling():
        _note(moved, layer, source, target)
    return moved


def _note(moved: Tensor, layer: str, source: int, target: int) -> None:
    log = _log.get()
    if log is None:
        return
    log.transfers.append(Transfer(layer, source, target, moved.nbytes, backward=False))
    if moved.requires_grad:
        moved.register_hook(
            lambda grad: log.transfers.append(Transfer(layer, target, source, grad.nbytes, backward=True))
        )
