"""A network's whole forward pass, or its whole training step, as one CUDA graph; large inference batches depth first.

Launched one by one, the kernels of a small batch wait for Python. A graph is launched once: it holds addresses, so that inputs
are copied to where it reads and results copied from where it writes, and it sees weights that are updated in place.

Depth first: layer after layer on a whole batch, each activation goes to memory and comes back (conv1's of 256 images in bf16 are
149 MB). A few images at a time through all layers, it is still in the second-level cache when the next layer reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# What an activation may take of the second-level cache: H100 and H200 have 50 and 60 MB in two partitions, and the next layer's
# weights and result want room too. A model of the hardware, not a measurement: bench/results/PENDING.md.
CACHE_BYTES = 40_000_000
_WARM_UP = 3  # runs before a capture: kernels are compiled, algorithms chosen, workspaces and optimiser state made


def images_in_cache(model: torch.nn.Module, example: Tensor) -> int:
    """How many images fit: the largest result of a layer stays within ``CACHE_BYTES``; a multiple of 8 from 8 on, at least 1."""
    largest = example[:1].numel() * example.element_size()

    def see(_: object, __: object, out: object) -> None:
        nonlocal largest
        if isinstance(out, Tensor):
            largest = max(largest, out.numel() * out.element_size())

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(see) for leaf in leaves]
    try:
        with torch.no_grad():
            model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    count = CACHE_BYTES // largest
    return max(1, count if count < 8 else count // 8 * 8)


class Graphed:
    """What :func:`graphed` makes: call it with a batch like its example."""

    def __init__(self, model: torch.nn.Module, example: Tensor, micro_batch: int | None = None) -> None:
        _require_batch("example", example)
        if _trains(model.modules()):
            raise ValueError(
                "model, or a module in it, is in training mode, where results depend on the batch; call model.eval() first"
            )
        _require_one_device(model, example)
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(
                f"micro_batch={micro_batch} must be at least 1 (images at a time), or None for what fits in cache"
            )
        self.model, self._autocast = model, _Autocast(example.device)
        self._modules = list(model.modules())
        with torch.inference_mode(False):  # a tensor made in that mode could be written to in it alone
            self._input = example.detach().clone()
        with self._autocast.on():
            self.micro_batch = min(len(example), micro_batch or images_in_cache(model, example))
        self._graph: torch.cuda.CUDAGraph | None = None
        if example.is_cuda:
            for _ in range(_WARM_UP):
                _beside(example.device, self._compute)
            self._weights, self._graph = _Weights(model), torch.cuda.CUDAGraph()
            with _capture(self._graph, example.device):
                self._output = self._compute()
        else:
            self._output = self._compute()  # its errors come now, as they would from a capture

    @torch.no_grad()
    def _compute(self) -> Tensor:
        with self._autocast.on():
            parts = [self.model(images) for images in self._input.split(self.micro_batch)]
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"model returns {type(parts[0]).__name__}, not a tensor; wrap it in a module that returns one"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The model's output for ``x``, a new tensor.

        Raises:
            ValueError: another shape, dtype or device than the example's.
            RuntimeError: the model is in training mode, or a weight lies elsewhere than it did when the graph was captured.
        """
        _require_like("x", x, self._input)
        if _trains(self._modules):
            raise RuntimeError("model, or a module in it, is in training mode now; call model.eval(), or model itself")
        self._input.copy_(x)
        if self._graph is None:
            return self._compute()
        if self._weights.have_moved():
            raise RuntimeError(
                "a weight lies elsewhere than when the graph was captured (model.to, load_state_dict(assign=True), a new "
                "parameter); update weights in place, or call graphed again"
            )
        self._graph.replay()
        return self._output.clone()

    def __repr__(self) -> str:
        how = "one CUDA graph" if self._graph is not None else f"no graph on {self._input.device.type}"
        return f"Graphed({type(self.model).__name__}, {_described(self._input)}, micro_batch={self.micro_batch}, {how})"


def _trains(modules: Iterable[torch.nn.Module]) -> bool:
    return any(module.training for module in modules)


def graphed(model: torch.nn.Module, example: Tensor, micro_batch: int | None = None) -> Graphed:
    """Inference as one CUDA graph, depth first; on a CPU the same computation in the same micro-batches, without a graph.

    Args:
        model: a module in evaluation mode, tensor to tensor, whose images do not depend on each other.
        example: a batch ``[N, ...]``. Only its shape, dtype, device and layout matter, which every later batch must have (the
            layout is converted). Autocast is as it is now.
        micro_batch: images that go through all layers at a time. By default what keeps the largest activation within 40 MB
            of cache: 64 for the paper's network in bf16, 32 in fp32.

    Returns:
        A callable. Its result is a new tensor at each call, without gradient. Weights that are updated in place are seen.

    Raises:
        ValueError: the model is in training mode, or on another device than ``example``; ``micro_batch`` below 1.
        TypeError: ``example`` is no tensor, or the model does not return one.

    >>> fast = graphed(torch.nn.Linear(4, 2).eval(), torch.zeros(6, 4), micro_batch=4)
    >>> fast
    Graphed(Linear, [6, 4] torch.float32 on cpu, micro_batch=4, no graph on cpu)
    >>> fast(torch.ones(6, 4)).shape
    torch.Size([6, 2])
    """
    return Graphed(model, example, micro_batch)


class GraphedStep:
    """What :func:`graphed_step` makes: call it with inputs and targets like its examples."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        example: tuple[Tensor, Tensor],
    ) -> None:
        inputs, targets = example
        _require_batch("example[0]", inputs)
        _require_batch("example[1]", targets)
        _require_one_device(model, inputs)
        if inputs.is_cuda and any(group.get("capturable") is False for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer={type(optimizer).__name__} counts its steps outside the device; make it with capturable=True"
            )
        self.model, self.loss, self.optimizer, self._capturable = model, loss, optimizer, inputs.is_cuda
        self._inputs, self._targets = inputs.detach().clone(), targets.detach().clone()
        self._autocast = _Autocast(inputs.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.zeros(())
        self._modules, self._weights = list(model.modules()), _Weights(model)
        self._parameters = list(model.parameters())
        self._halves = [p for p in self._parameters if p.dtype in (torch.float16, torch.bfloat16)]
        self._left, self._held = _WARM_UP, self._numbers()

    def _numbers(self) -> list[Any]:
        """What a capture freezes beside the weights' addresses: the optimiser's numbers and where its state lies (a checkpoint
        that is loaded lies elsewhere), the mode of every module, and which parameters learn. And the versions of half
        parameters: an optimiser that holds them in fp32 has to see what somebody else wrote into them."""
        state = [t.data_ptr() for kept in self.optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)]
        groups = [[v for v in group.values() if isinstance(v, int | float)] for group in self.optimizer.param_groups]
        modes = [module.training for module in self._modules]
        return [groups, state, modes, [p.requires_grad for p in self._parameters], [p._version for p in self._halves]]

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)  # so that a graph writes its gradients anew instead of adding
        with self._autocast.on():
            value = self.loss(self.model(self._inputs), self._targets)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step; the loss before it, a new tensor.

        Raises:
            ValueError: another shape, dtype or device than the example's.
        """
        _require_like("inputs", inputs, self._inputs)
        _require_like("targets", targets, self._targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        if not self._capturable:
            return self._step()
        if self._numbers() != self._held or self._weights.have_moved():  # a scheduler's new lr, say
            # one step as it is, which makes what the next capture must find
            self._graph, self._left, self._weights = None, max(1, self._left), _Weights(self.model)
        if self._graph is None and self._left:
            self._left -= 1
            value = _beside(self._inputs.device, self._step)
            self._held = self._numbers()
            return value
        if self._graph is None:
            self._graph, self._output = self._captured()
            self._held = self._numbers()
        self._graph.replay()
        return self._output.clone()

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with _capture(graph, self._inputs.device):
            output = self._step()
        return graph, output

    def __repr__(self) -> str:
        parts = f"{type(self.model).__name__}, {type(self.optimizer).__name__}, {_described(self._inputs)}"
        if not self._capturable:
            return f"GraphedStep({parts}, no graph on {self._inputs.device.type})"
        how = "one CUDA graph" if self._graph is not None else f"a CUDA graph after {self._left} more calls"
        return f"GraphedStep({parts}, {how})"


def graphed_step(
    model: torch.nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    example: tuple[Tensor, Tensor],
) -> GraphedStep:
    """A training step (forward, ``loss(output, targets)``, backward, ``optimizer.step()``) as one CUDA graph.

    Every call is one step. The first three run as they are, for they compile, choose and allocate what a graph must find; the
    fourth is captured, and replayed from then on. Where a number of the optimiser changes (a scheduler's ``lr``), a module's
    mode, whether a parameter learns, or where a weight or the optimiser's state lies, one call runs as it is and the next is
    captured anew; an ``lr`` that is a tensor on the device changes without that. Dropout draws new masks at each replay. On a
    CPU every call runs as it is.

    Args:
        model, loss, optimizer: as in a training loop of one's own. The optimiser must keep its state on the device, as
            ``optim.SGD`` and ``torch.optim.SGD`` do; others have ``capturable=True``.
        example: inputs and targets; later ones must have their shapes, dtypes and device. Autocast is as it is now.

    Returns:
        A callable of inputs and targets; it returns the loss, a new tensor that does not wait for the device.

    Raises:
        ValueError: the model is on another device than the inputs; the optimiser counts steps on the CPU.

    >>> layer = torch.nn.Linear(4, 2)
    >>> sgd = torch.optim.SGD(layer.parameters(), 0.1)
    >>> step = graphed_step(layer, torch.nn.functional.cross_entropy, sgd, (torch.ones(3, 4), torch.tensor([0, 1, 1])))
    >>> first, second = (step(torch.ones(3, 4), torch.tensor([1, 1, 1])) for _ in range(2))
    >>> bool(second < first)
    True
    """
    return GraphedStep(model, loss, optimizer, example)


class _Autocast:
    """Autocast as it is now, for later; without its cache of cast weights, which a graph would read after it is gone."""

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.enabled = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)

    def on(self) -> torch.autocast:
        return torch.autocast(self.kind, self.dtype, self.enabled, cache_enabled=False)


def _beside(device: torch.device, function: Callable[[], Tensor]) -> Tensor:
    """``function()`` on a stream of its own, as before a capture everything should run; the caller's stream waits for it."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            out = function()
        current.wait_stream(side)
        out.record_stream(current)
    return out


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record what the block does on ``device``. Torch's own capture stream is made once in a process, on the device of the first
    capture: for any other it would record nothing. Threads beside this one (a loader that pins memory) may go on meanwhile.
    """
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        yield


class _Weights:
    """Where a model's parameters and buffers are: looked up in a few microseconds, where walking the modules takes fifty."""

    def __init__(self, model: torch.nn.Module) -> None:
        tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        self._rows = [
            (table, name, t, t.data_ptr()) for table in tables for name, t in table.items() if isinstance(t, Tensor)
        ]

    def have_moved(self) -> bool:
        return any(table.get(name) is not t or t.data_ptr() != address for table, name, t, address in self._rows)


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def _require_batch(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; a batch of at least one is needed, [N, ...]")


def _require_one_device(model: torch.nn.Module, x: Tensor) -> None:
    devices = {t.device for part in (model.parameters(), model.buffers()) for t in part} - {x.device}
    if devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model has tensors on {found}, the example is on {x.device}; a graph belongs to one device")


def _require_like(name: str, x: Tensor, like: Tensor) -> None:
    if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise ValueError(f"{name} is {_described(x)}, made for {_described(like)}; convert it, or make another")
