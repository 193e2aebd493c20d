"""Whom we are compared with, as a table: a name, why it cannot run a problem (or None), and how to build its call.

A CUDA graph is no contender of its own: the timer replays every contender from one where it can. ``cudnn.benchmark`` is on
for all (``cases.precision``). The best baseline of a row, by median, is the one ours is compared with, by name.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from alexnet_kernels import functional as F
from alexnet_kernels import use_backend
from alexnet_kernels.geometry import LRN, Conv, LayerFacts, Linear, MaxPool, ReLU

from . import cudnn
from .cases import Problem, Tensors

Call = Callable[[], Any]
Network = Callable[..., Tensor]  # input, parameters -> output
LAYOUTS = ("nchw", "channels_last")


@dataclass(frozen=True)
class Contender:
    """``why_not(problem)``: None, or why it cannot run it; ``build(problem, tensors)``: a call on one set of buffers."""

    name: str
    why_not: Callable[[Problem], str | None]
    build: Callable[[Problem, Tensors], Call]

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def stock_network(facts: Sequence[LayerFacts], *, split: bool = False) -> Network:
    """The unit in torch's own operations; with ``split`` a grouped convolution is two convolutions and a concatenation."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        left = list(weights)
        for f in facts:
            match f.op:
                case Conv() as op:
                    x = _conv(_extended(x, op), left.pop(0), left.pop(0), op, split)
                case Linear():
                    x = TF.linear(x, left.pop(0), left.pop(0))
                case ReLU():
                    x = TF.relu(x, inplace=f is not facts[0])
                case LRN() as op:
                    x = _stock_lrn(x, op)
                case MaxPool() as op:
                    x = TF.max_pool2d(x, op.kernel, op.stride)
                case _:
                    raise NotImplementedError(f"{f.name}: {type(f.op).__name__} is not measured by itself")
        return x

    return run


def _extended(x: Tensor, op: Conv) -> Tensor:
    right, bottom = op.extra(x.shape[-1]), op.extra(x.shape[-2])
    return TF.pad(x, (0, right, 0, bottom)) if right or bottom else x


def _conv(x: Tensor, weight: Tensor, bias: Tensor, op: Conv, split: bool) -> Tensor:
    if not split or op.groups == 1:
        return TF.conv2d(x, weight, bias, op.stride, op.padding, groups=op.groups)
    towers = zip(x.chunk(op.groups, 1), weight.chunk(op.groups), bias.chunk(op.groups), strict=True)
    return torch.cat([TF.conv2d(a, w, b, op.stride, op.padding) for a, w, b in towers], 1)


def _stock_lrn(x: Tensor, op: LRN) -> Tensor:
    """torch's LRN with towers as images; torch has none in half types on a CPU, where fp32 stands in."""
    n, c = x.shape[:2]
    towers = x.reshape(n * op.groups, c // op.groups, *x.shape[2:]) if op.groups > 1 else x
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        towers = towers.float()
    alpha = op.alpha * op.size if op.alpha_mode == "sum" else op.alpha
    return TF.local_response_norm(towers, op.size, alpha, op.beta, op.k).reshape(x.shape).to(x.dtype)


_KNOWN = (
    (Conv, ReLU, LRN, MaxPool),
    (Conv, ReLU),
    (Linear, ReLU),
    (LRN, MaxPool),
)  # as FusedSequential: the longest first


def _runs(facts: Sequence[LayerFacts]) -> list[Sequence[LayerFacts]]:
    runs: list[Sequence[LayerFacts]] = []
    while facts:
        kinds = tuple(type(f.op) for f in facts)
        length = next((len(known) for known in _KNOWN if kinds[: len(known)] == known), 1)
        runs.append(facts[:length])
        facts = facts[length:]
    return runs


def our_network(facts: Sequence[LayerFacts]) -> Network:
    """The unit in this package's functions, neighbours fused where there is a function for all of them."""
    runs = _runs(facts)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        left = list(weights)
        for fs in runs:
            x = _our_run(x, [f.op for f in fs], left)
        return x

    return run


def _our_run(x: Tensor, ops: Sequence[Any], left: list[Tensor]) -> Tensor:
    """``ops`` as one call; takes its parameters from the front of ``left``."""
    match ops:
        case [Conv() as op, *after]:
            x, parameters, window = _extended(x, op), (left.pop(0), left.pop(0)), (op.stride, op.padding, 1, op.groups)
            if len(after) == 3:
                _, lrn, pool = after
                norm, pooling = (lrn.size, lrn.alpha, lrn.beta, lrn.k), (pool.kernel, pool.stride, 0, 1, False)
                return F.conv2d_relu_lrn_max_pool2d(x, *parameters, window, norm, pooling, **_scope(lrn))
            return (F.conv2d_relu if after else TF.conv2d)(x, *parameters, *window)
        case [Linear(), *after]:
            return (F.linear_relu if after else TF.linear)(x, left.pop(0), left.pop(0))
        case [LRN() as op, *after]:
            norm = (op.size, op.alpha, op.beta, op.k)
            if after:
                return F.lrn_max_pool2d(x, *norm, after[0].kernel, after[0].stride, **_scope(op))
            return F.local_response_norm(x, *norm, **_scope(op))
        case [MaxPool() as op]:
            return F.max_pool2d(x, op.kernel, op.stride)
        case _:
            return TF.relu(x)


def _scope(op: LRN) -> dict[str, Any]:
    return {"groups": op.groups, "alpha_mode": op.alpha_mode}


class Backward:
    """Gradients of a unit from a forward pass that was made once, on the stream that asks: autograd returns to that stream,
    which must be the one being captured."""

    def __init__(self, problem: Problem, network: Network, tensors: Tensors) -> None:
        self.problem, self.network, self.grad = problem, network, tensors.grad
        self.x = tensors.x.detach().requires_grad_(not problem.unit.first)
        self.weights = [w.detach().requires_grad_() for w in tensors.weights]
        self.output: Tensor | None = None
        self.stream: object = None

    def __call__(self) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream() if self.x.is_cuda else None
        if self.output is None or stream != self.stream:
            if stream is not None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("warm a backward call up on the stream that will be captured")
            with torch.enable_grad(), self.problem.autocast():
                self.output, self.stream = self.network(self.x, *self.weights), stream
            self.grad = self.grad.to(self.output.dtype)  # once: no pass over it inside what is timed
        wanted = [t for t in (self.x, *self.weights) if t.requires_grad]
        return torch.autograd.grad(self.output, wanted, self.grad, retain_graph=True)


def _call(problem: Problem, network: Network, tensors: Tensors) -> Call:
    if problem.run == "backward":
        return Backward(problem, network, tensors)

    def forward() -> Tensor:
        with torch.no_grad(), problem.autocast():
            return network(tensors.x, *tensors.weights)

    return forward


def _in_layout(tensors: Tensors, layout: str) -> Tensors:
    return tensors.channels_last() if layout == "channels_last" else tensors


def _eager(make: Callable[[Problem], Network], layout: str) -> Callable[[Problem, Tensors], Call]:
    return lambda problem, tensors: _call(problem, make(problem), _in_layout(tensors, layout))


@functools.cache
def _compiled(
    facts: tuple[LayerFacts, ...], split: bool, options: tuple[tuple[str, Any], ...], key: Problem
) -> Network:
    """One compilation for all buffer sets of a problem."""
    return torch.compile(stock_network(facts, split=split), dynamic=False, options=dict(options) or None)


def forget_compiled() -> None:
    """Begin with an empty cache. Dynamo counts all compilations of one function's code together, and after eight it would run
    the rest eagerly without a word: then it is to fail instead."""
    _compiled.cache_clear()
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _compile(layout: str, split: bool = False, **options: Any) -> Callable[[Problem, Tensors], Call]:
    def build(problem: Problem, tensors: Tensors) -> Call:
        network = _compiled(problem.unit.facts, split, tuple(sorted(options.items())), problem)
        return _call(problem, network, _in_layout(tensors, layout))

    return build


def _always(problem: Problem) -> str | None:
    return None


def _needs_maps(problem: Problem) -> str | None:
    return None if problem.unit.input[1:] != (1, 1) and problem.unit.kind[:6] != "linear" else "a matrix has one layout"


def _grouped(problem: Problem) -> str | None:
    if any(isinstance(f.op, Conv) and f.op.groups > 1 for f in problem.unit.facts):
        return None
    return "no grouped convolution"


def _both(*rules: Callable[[Problem], str | None]) -> Callable[[Problem], str | None]:
    return lambda problem: next((why for rule in rules if (why := rule(problem)) is not None), None)


@functools.cache
def compiler_missing() -> str | None:
    """Why torch.compile cannot work on a CPU here: it needs a C++ compiler."""
    if sys.platform == "win32" or not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler here"
    return None


def _can_compile(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return None
    few = problem.unit.name == "norm1+pool1" and problem.track == "fp32" and problem.run == "forward"
    if not few or problem.batch == 1:
        return "on a CPU only norm1+pool1 forward is compiled, in fp32 at batch 16: each compilation takes seconds"
    return compiler_missing()


def _gpu(problem: Problem) -> str | None:
    return "needs a GPU" if problem.device == "cpu" else None


def _fused_conv(problem: Problem) -> str | None:
    if problem.unit.kind != "conv+relu":
        return "is one convolution with its ReLU"
    if problem.run == "backward":
        return "has no backward"
    if problem.track == "amp":
        return "knows no autocast"
    return _gpu(problem)


def _build_fused_conv(layout: str) -> Callable[[Problem, Tensors], Call]:
    def build(problem: Problem, tensors: Tensors) -> Call:
        t, op = _in_layout(tensors, layout), problem.unit.op(Conv)

        def forward() -> Tensor:
            with torch.no_grad():
                s, p = [op.stride] * 2, [op.padding] * 2
                return torch.cudnn_convolution_relu(_extended(t.x, op), *t.weights, s, p, [1, 1], op.groups)

        return forward

    return build


def _cudnn_lrn(layout: str) -> Callable[[Problem], str | None]:
    def why_not(problem: Problem) -> str | None:
        if problem.unit.kind != "lrn":
            return "is an LRN by itself"
        if problem.track == "amp":
            return "knows no autocast"
        if layout == "channels_last" and problem.unit.op(LRN).groups > 1:
            return "towers as images need NCHW"
        return _gpu(problem)

    return why_not


def _build_cudnn_lrn(layout: str) -> Callable[[Problem, Tensors], Call]:
    def build(problem: Problem, tensors: Tensors) -> Call:
        t, op = _in_layout(tensors, layout), problem.unit.op(LRN)
        alpha = op.alpha * op.size if op.alpha_mode == "sum" else op.alpha
        forward, backward = cudnn.lrn(t.x, op.size, alpha, op.beta, op.k, op.groups)
        return forward if problem.run == "forward" else backward(t.grad)

    return build


def _cudnn_pool(problem: Problem) -> str | None:
    if problem.unit.kind != "pool":
        return "is a pooling by itself"
    return "knows no autocast" if problem.track == "amp" else _gpu(problem)


def _build_cudnn_pool(layout: str) -> Callable[[Problem, Tensors], Call]:
    def build(problem: Problem, tensors: Tensors) -> Call:
        t, op = _in_layout(tensors, layout), problem.unit.op(MaxPool)
        forward, backward = cudnn.max_pool2d(t.x, op.kernel, op.stride)
        return forward if problem.run == "forward" else backward(t.grad)

    return build


def _stock(problem: Problem) -> Network:
    return stock_network(problem.unit.facts)


def _split(problem: Problem) -> Network:
    return stock_network(problem.unit.facts, split=True)


def _ours(problem: Problem) -> Network:
    return our_network(problem.unit.facts)


def _other_backward(problem: Problem) -> str | None:
    """Where CUDA's and Triton's fused gradient both exist: ``ops/fused.py`` takes one first, by count."""
    if problem.unit.kind != "lrn+pool" or problem.run != "backward" or problem.track == "amp":
        return "is the gradient of LRN and pooling as one"
    return _gpu(problem)


def _on(backend: str, layout: str) -> Callable[[Problem, Tensors], Call]:
    def network(problem: Problem) -> Network:
        inner = _ours(problem)

        def run(x: Tensor, *weights: Tensor) -> Tensor:
            with use_backend(backend):
                return inner(x, *weights)

        return run

    return _eager(network, layout)


_FORCED = {"layout_optimization": True, "force_layout_optimization": True}
_AUTOTUNE = {"max_autotune": True}  # without Inductor's own CUDA graphs: the timer captures every contender alike

OURS = (
    Contender("ours nchw", _always, _eager(_ours, "nchw")),
    Contender("ours channels_last", _needs_maps, _eager(_ours, "channels_last")),
    Contender("ours by Triton nchw", _other_backward, _on("triton", "nchw")),
    Contender("ours by Triton channels_last", _other_backward, _on("triton", "channels_last")),
)
BASELINES = (
    Contender("eager nchw", _always, _eager(_stock, "nchw")),
    Contender("eager channels_last", _needs_maps, _eager(_stock, "channels_last")),
    Contender("eager split towers nchw", _grouped, _eager(_split, "nchw")),
    Contender("eager split towers channels_last", _grouped, _eager(_split, "channels_last")),
    Contender("cudnn_convolution_relu nchw", _fused_conv, _build_fused_conv("nchw")),
    Contender("cudnn_convolution_relu channels_last", _fused_conv, _build_fused_conv("channels_last")),
    Contender("cuDNN LRN nchw", _cudnn_lrn("nchw"), _build_cudnn_lrn("nchw")),
    Contender("cuDNN LRN channels_last", _cudnn_lrn("channels_last"), _build_cudnn_lrn("channels_last")),
    Contender("cuDNN pooling nchw", _cudnn_pool, _build_cudnn_pool("nchw")),
    Contender("cuDNN pooling channels_last", _cudnn_pool, _build_cudnn_pool("channels_last")),
    Contender("compile nchw", _can_compile, _compile("nchw")),
    Contender("compile channels_last", _both(_gpu, _needs_maps), _compile("channels_last", **_FORCED)),
    Contender("compile split towers", _both(_gpu, _grouped), _compile("channels_last", split=True, **_FORCED)),
    Contender("max-autotune nchw", _gpu, _compile("nchw", **_AUTOTUNE)),
    Contender(
        "max-autotune channels_last", _both(_gpu, _needs_maps), _compile("channels_last", **_AUTOTUNE, **_FORCED)
    ),
)
SLOW_TO_BUILD = ("compile", "max-autotune")  # beginnings of names


def contenders(
    problem: Problem, *, compiled: bool = True, autotune: bool = True
) -> tuple[list[Contender], dict[str, str]]:
    """Who runs a problem, ours first, and why the others do not."""
    left_out: dict[str, str] = {}
    chosen = []
    for contender in (*OURS, *BASELINES):
        why = contender.why_not(problem)
        if why is None and contender.name.startswith("compile") and not compiled:
            why = "compilation is left out of this profile"
        if why is None and contender.name.startswith("max-autotune") and not (compiled and autotune):
            why = "autotuning is left out of this profile"
        if why is None:
            chosen.append(contender)
        else:
            left_out[contender.name] = why
    return chosen, left_out


def truth(problem: Problem, tensors: Tensors) -> tuple[Tensor, ...]:
    """The problem's results in fp64, from the very values the contenders get."""
    exact = tensors.to(torch.float64)
    network = stock_network(problem.unit.facts)
    if problem.run == "forward":
        with torch.no_grad():
            return (network(exact.x, *exact.weights),)
    return Backward(_without_autocast(problem), network, exact)()


def _without_autocast(problem: Problem) -> Problem:
    return Problem(problem.unit, problem.run, "fp32", problem.batch, problem.device)
