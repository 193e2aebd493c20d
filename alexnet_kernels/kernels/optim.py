"""Stochastic gradient descent with momentum over many tensors in one launch, the fp32 copy and the half weight in one pass.

With ``w`` the fp32 weight (the master, or the parameter itself where that is fp32), ``b`` the momentum and ``g`` the gradient:

``d = g + decay · w``,  ``b ← momentum · b + d``,  ``u = d + momentum · b`` (Nesterov) or ``b``,  ``w ← w - lr · u``

and where the parameter is a half type it becomes ``w``, rounded. A half parameter costs 20 bytes an element: ``g`` 2, ``b`` and
``w`` 4 + 4 each, the parameter 2. As separate steps the same is 32: two casts, of gradient and weight, are 6 each.

Every line is rounded as torch's kernels round it: the three products with another term are fused (``a + alpha · b``, which every
compiler makes of torch's source), and ``momentum · b`` is rounded before ``d`` is added, for torch has two kernels there. So the
fp32 numbers are torch's to the last bit. ``fma(b, momentum, 0)`` says so to a compiler that would fuse what it finds.

Addresses stand in a table in device memory, [tensors, 5]: parameter, gradient, momentum, fp32 weight, elements. A program takes
one chunk of one tensor, which ``chunks`` [programs, 2] names. Tensors of a launch share their dtypes and are dense, each with the
strides of its parameter, so that order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, Launch, block_of, run, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

CONFIGS = {"sgd": Config(block=4096, num_warps=8)}
_ELEMENT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_COLUMNS = 5


@triton.jit
def _pointer(entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that stands at ``entry``, as a pointer; ALIGNED promises a multiple of 16 bytes."""
    p = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _update(
    row, start, lane, ok, rate, grad_scale, momentum, decay,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOVING: tl.constexpr, DECAYED: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The step of this file's head for the elements ``start + lane`` of the tensor at ``row``, those that are ``ok``."""
    g = tl.load(_pointer(row + 1, GRAD, ALIGNED) + start + lane, mask=ok, other=0.0).to(tl.float32)
    master = _pointer(row + 3, tl.float32, ALIGNED) + start + lane
    w = tl.load(master, mask=ok, other=0.0)
    if SCALED:
        g = g / tl.load(grad_scale)
    if MAXIMIZE:
        g = -g
    if DECAYED:
        g = tl.fma(w, decay, g)
    if MOVING:
        buffer = _pointer(row + 2, tl.float32, ALIGNED) + start + lane
        b = tl.fma(tl.load(buffer, mask=ok, other=0.0), momentum, 0.0) + g
        tl.store(buffer, b, mask=ok)
        g = tl.fma(b, momentum, g) if NESTEROV else b
    w = tl.fma(g, -rate, w)
    tl.store(master, w, mask=ok)
    if WEIGHT != tl.float32:
        tl.store(_pointer(row, WEIGHT, ALIGNED) + start + lane, w.to(WEIGHT), mask=ok)


@triton.jit
def _sgd(
    table, chunks, lr, found_inf, grad_scale, momentum, decay,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOVING: tl.constexpr, DECAYED: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, LR_IN_MEMORY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of this file's head; one program: BLOCK elements of one tensor. SCALED, ``g`` is divided by ``grad_scale`` first,
    and where ``found_inf`` is not 0 no element counts.

    A chunk that is full needs no mask by element, which would keep a thread from 16 bytes at once.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(chunk).to(tl.int64) * 5
    count = tl.load(row + 4)
    if SCALED:
        count = tl.where(tl.load(found_inf) == 0.0, count, 0)
    start, lane, real = block_of(tl.load(chunk + 1), count, BLOCK)
    rate = tl.load(lr).to(tl.float32) if LR_IN_MEMORY else lr
    every = tl.full((BLOCK,), 1, tl.int1)
    if start + BLOCK <= count:
        _update(
            row, start, lane, every, rate, grad_scale, momentum, decay,
            WEIGHT, GRAD, MOVING, DECAYED, NESTEROV, MAXIMIZE, SCALED, ALIGNED,
        )  # fmt: skip
    else:
        _update(
            row, start, lane, real, rate, grad_scale, momentum, decay,
            WEIGHT, GRAD, MOVING, DECAYED, NESTEROV, MAXIMIZE, SCALED, ALIGNED,
        )  # fmt: skip


@dataclass
class Table:
    """The addresses of a list of tensors on their device, written anew only when one of them has moved, and their chunks.

    A captured CUDA graph reads the table that was there, or copies it again at each replay: neither is ever given back. During
    a capture no page-locked memory can be had: some is kept ready.
    """

    addresses: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    here: Tensor | None = None
    there: Tensor | None = None
    chunks: Tensor | None = None
    spare: Tensor | None = None
    captured: list[tuple[Tensor | None, ...]] = field(default_factory=list)

    def of(self, columns: Sequence[Sequence[Tensor]], block: int) -> tuple[Tensor, Tensor]:
        """``table`` and ``chunks`` for these tensors: parameters, gradients, momenta, fp32 weights."""
        device = columns[0][0].device
        capturing = _is_capturing(device)
        addresses = tuple(t.data_ptr() for column in columns for t in column)
        sizes = tuple(t.numel() for t in columns[0])
        if sizes != self.sizes or self.chunks is None:
            rows = [(i, c) for i, size in enumerate(sizes) for c in range(triton.cdiv(size, block))]
            self.chunks, self.spare = torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, 2).to(device), None
        if sizes != self.sizes or addresses != self.addresses or self.there is None:
            self.here = self.spare if capturing and self.spare is not None else _page_locked(len(sizes), device)
            self.here.copy_(torch.tensor([*addresses, *sizes], device="cpu").view(_COLUMNS, -1).t())
            self.there = self.here.to(device, non_blocking=True, copy=True)
            self.spare = None if capturing else _page_locked(len(sizes), device)
            self.addresses, self.sizes = addresses, sizes
        if capturing:
            self.captured.append((self.here, self.there, self.chunks))
        return self.there, self.chunks

    @property
    def aligned(self) -> bool:
        return all(address % 16 == 0 for address in self.addresses)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _page_locked(count: int, device: torch.device) -> Tensor:
    """On the host, whatever ``torch.set_default_device`` says."""
    return torch.empty((count, _COLUMNS), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def plan(
    table: Tensor, chunks: Tensor, kinds: tuple[torch.dtype, torch.dtype], lr: float | Tensor, momentum: float, decay: float,
    nesterov: bool, maximize: bool, scaling: tuple[Tensor, Tensor] | None, aligned: bool,
) -> Launch:  # fmt: skip
    """The launch for tensors whose parameters and gradients have the dtypes ``kinds``."""
    config = tuned("optim", table.device).get("sgd", CONFIGS["sgd"])
    constants = {
        "WEIGHT": _ELEMENT[kinds[0]],
        "GRAD": _ELEMENT[kinds[1]],
        "MOVING": momentum != 0,
        "DECAYED": decay != 0,
        "NESTEROV": nesterov,
        "MAXIMIZE": maximize,
        "SCALED": scaling is not None,
        "LR_IN_MEMORY": isinstance(lr, Tensor),
        "ALIGNED": aligned,
        "BLOCK": config.block,
    }
    grad_scale, found_inf = scaling or (table, table)
    rate = lr if isinstance(lr, Tensor) else float(lr)  # an integer would be compiled in: lr=1 as a constant
    args = (table, chunks, rate, found_inf, grad_scale, float(momentum), float(decay))
    return Launch(_sgd, (chunks.shape[0],), args, constants, config.num_warps, config.block)


def sgd(
    table: Table, weights: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], masters: Sequence[Tensor],
    lr: float | Tensor, momentum: float, decay: float, nesterov: bool, maximize: bool,
    scaling: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """One step in place. ``masters`` are ``weights`` where those are fp32, ``buffers`` anything like them without momentum."""
    block = tuned("optim", weights[0].device).get("sgd", CONFIGS["sgd"]).block
    addresses, chunks = table.of((weights, grads, buffers, masters), block)
    kinds = (weights[0].dtype, grads[0].dtype)
    run(plan(addresses, chunks, kinds, lr, momentum, decay, nesterov, maximize, scaling, table.aligned))


def shipped() -> Iterator[tuple[str, Launch]]:
    """The step of AlexNet's training, its variants, and unaligned tensors, on meta tensors: for offline compilation."""
    table = torch.empty(16, _COLUMNS, dtype=torch.int64, device="meta")
    chunks = torch.empty(14890, 2, dtype=torch.int32, device="meta")
    rate = torch.empty(1, device="meta")
    for dtype, aligned in product(DTYPES, (True, False)):
        how = f"{str(dtype)[6:]} {'aligned' if aligned else 'unaligned'}"
        kinds = (dtype, dtype)
        yield f"sgd {how}", plan(table, chunks, kinds, 0.01, 0.9, 5e-4, False, False, None, aligned)
        yield f"sgd {how} nesterov", plan(table, chunks, kinds, 0.01, 0.9, 5e-4, True, False, None, aligned)
        yield f"sgd {how} plain", plan(table, chunks, kinds, 0.01, 0.0, 0.0, False, False, None, aligned)
        scaling = (rate, rate)
        yield f"sgd {how} scaled", plan(table, chunks, kinds, rate, 0.9, 5e-4, False, True, scaling, aligned)
