"""Whole networks: inference and a training step with SGD, momentum and weight decay, against every way torch has of running them.

    pytest bench/test_model.py --benchmark-only

Dropout is set to 0, so that results can be checked against fp64; the learning rate too, so that each step does the same.
The timer replays every contender from a CUDA graph where it can be captured. "graphed" is what a user of ours gets without
writing one, with the copies into and out of the graph: ``models.graphed``, depth first and with the whole batch at once, and
``models.graphed_step`` with ``optim.SGD``. That updates all weights in one kernel, as torch's does with ``fused=True``, which is
not its default: on a GPU eager and compiled networks take a training step with both. In half types ours has its weights in fp32,
torch's has them in the half type: ours moves more there, and is exact.
"Build" and "first call" are seconds, compilation among them; compilations find an empty cache, those with the fused optimiser
what the one before left. Peak memory is torch's count of one call on a GPU. Two devices are two GPUs, or one device twice, and
the row says which.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

from alexnet_kernels import geometry, models, optim
from alexnet_kernels.comparison.run import training_step
from alexnet_kernels.comparison.stock import stock_alexnet
from alexnet_kernels.models import TwoDeviceAlexNet

from .baselines import _AUTOTUNE, _FORCED, Call
from .cases import TRACKS, precision
from .rows import _EPS, measure_builders

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = ("inference", "training")
NETWORKS = ("paper", "torchvision")


@dataclass(frozen=True)
class Whole:
    network: str
    run: str
    track: str
    batch: int

    @property
    def id(self) -> str:
        return f"{self.network}/{self.run}/{self.track}/{self.batch}"

    @property
    def variant(self) -> geometry.Variant:
        return geometry.variant(self.network, dropout=0.0)

    @property
    def flops(self) -> int:
        return self.batch * self.variant.flops(training=self.run == "training")

    @property
    def bytes(self) -> int:
        """The least a step must move when every group is one kernel; training: forward, and twice as much backward, and
        the update of weights and momentum (each read and written). Under autocast image and parameters are fp32, and what
        passes from group to group is bf16."""
        variant, size = self.variant, TRACKS[self.track].itemsize
        between = 2 if self.track == "amp" else size
        forward = sum(variant.group_bytes(group.name, self.batch, between) for group in variant.groups)
        forward += (size - between) * (self.batch * 3 * math.prod(variant.input_size) + variant.parameters)
        return forward if self.run == "inference" else 3 * forward + 4 * size * variant.parameters


def _wholes() -> list[Whole]:
    if DEVICE.type == "cpu":  # a training step takes as long as all of inference
        cases = [("inference", "fp32", 16), ("inference", "fp32", 1), ("inference", "bf16", 1)]
        cases += [("training", "fp32", 16), ("training", "fp32", 1)]
        return [Whole(network, *case) for case in cases for network in NETWORKS]
    return [
        Whole(network, run, track, batch)
        for batch in (256, 128, 32, 1, 1024)
        for track in ("bf16", "amp", "tf32", "fp32", "fp16")
        for network in NETWORKS
        for run in RUNS
    ]


def _weights(whole: Whole) -> dict[str, torch.Tensor]:
    """He-initialised, so that activations keep their size through the layers and gradients mean something."""
    model, generator = models.alexnet(whole.variant), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.1 if name.endswith("bias") else (2 / parameter[0].numel()) ** 0.5
        torch.nn.init.normal_(parameter, 0.0, std, generator=generator)
    return model.state_dict()


def _ends(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Gradients of the first and the last weights: everything between them has to be right for the first."""
    found = [p.grad for p in model.parameters()]
    return found[0], found[-2]


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return TF.cross_entropy(logits.float(), labels)


def _sgd(model: torch.nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def _our_step(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """``comparison.run.training_step`` with our optimiser."""
    optimiser = _sgd(model)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        _loss(model(x), labels).backward()
        optimiser.step()

    return step


def _graphed(
    whole: Whole, model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, micro_batch: int | None = None
) -> Call:
    """The whole as one graph, which the timer's cannot hold."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=whole.track == "amp"):
        if whole.run == "inference":
            network = models.graphed(model.eval(), x, micro_batch)
        else:
            step = models.graphed_step(model.train(), _loss, _sgd(model), (x, labels))

    def call() -> torch.Tensor | tuple[torch.Tensor, ...]:
        if DEVICE.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("is a CUDA graph already")
        if whole.run == "inference":
            return network(x)
        step(x, labels)
        return _ends(model)

    return call


def _call(
    whole: Whole,
    model: torch.nn.Module,
    x: torch.Tensor,
    labels: torch.Tensor,
    body: Any = None,
    stepping: Callable[..., Callable[[], None]] = training_step,
) -> Call:
    """``body`` runs (a compiled one, or the model itself), ``model`` has the parameters."""
    body = body or model

    def run(inputs: torch.Tensor) -> torch.Tensor:
        if whole.track == "amp":
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return body(inputs)
        return body(inputs)

    if whole.run == "inference":
        model.eval()

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run(x)

        return forward
    model.train()
    step = stepping(_Runs(model, run), x, labels)

    def train() -> tuple[torch.Tensor, ...]:
        step()
        return _ends(model)

    return train


def _fused_sgd(*arguments: Any, **options: Any) -> Call:
    """:func:`_call` with torch's own optimiser of one kernel, which is not its default."""
    stepping = functools.partial(training_step, sgd=functools.partial(torch.optim.SGD, fused=True))
    return _call(*arguments, stepping=stepping, **options)


class _Runs(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def _truth(
    whole: Whole, weights: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """In fp64, from the very values the contenders get."""
    model = stock_alexnet(whole.variant)
    model.load_state_dict({name: value.to(TRACKS[whole.track]) for name, value in weights.items()})
    model = model.to(DEVICE, torch.float64)
    if whole.run == "inference":
        with torch.no_grad():
            return (model.eval()(x.double()),)
    TF.cross_entropy(model.train()(x.double()), labels).backward()
    return _ends(model)


def _builders(
    whole: Whole, weights: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor, budget
) -> dict[str, Callable[[], list[Call]]]:
    def make(
        new: Callable[..., torch.nn.Module], layout: str, options: dict[str, Any] | None = None, way: Any = _call
    ) -> list[Call]:
        model = new(whole.variant)
        model.load_state_dict(weights)
        kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        model = model.to(DEVICE, TRACKS[whole.track], memory_format=kind)
        images = x.contiguous(memory_format=kind)
        if options is not None:
            way = functools.partial(way, body=torch.compile(model, dynamic=False, options=options or None))
        return [way(whole, model, images, labels)]

    def theirs(variant: geometry.Variant) -> torch.nn.Module:
        import torchvision

        model = torchvision.models.alexnet(num_classes=variant.num_classes)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    ours, stock = models.alexnet, stock_alexnet
    found: dict[str, Callable[[], list[Call]]] = {
        "ours nchw": lambda: make(ours, "nchw"),
        "ours channels_last": lambda: make(ours, "channels_last"),
    }
    if DEVICE.type == "cuda":
        found["ours graphed channels_last"] = lambda: make(ours, "channels_last", way=_graphed)
        if whole.run == "inference":
            at_once = functools.partial(_graphed, micro_batch=whole.batch)
            found["ours graphed at once channels_last"] = lambda: make(ours, "channels_last", way=at_once)
        else:
            stepped = functools.partial(_call, stepping=_our_step)
            found["ours optim.SGD channels_last"] = lambda: make(ours, "channels_last", way=stepped)
    torchs: dict[str, tuple[str, dict[str, Any] | None]] = {
        "eager nchw": ("nchw", None),
        "eager channels_last": ("channels_last", None),
    }
    if whole.network == "torchvision":
        found["torchvision.models.alexnet"] = lambda: make(theirs, "nchw")
    first = whole.network == "paper" and whole.track == "bf16" and whole.batch == 256
    if DEVICE.type == "cuda" and (budget.compiled == "all" or (first and budget.compiled == "first")):
        torchs |= {"compile nchw": ("nchw", {}), "compile channels_last": ("channels_last", _FORCED)}
        if budget.autotune:
            torchs["max-autotune channels_last"] = ("channels_last", {**_AUTOTUNE, **_FORCED})
    for name, how in torchs.items():
        found[name] = functools.partial(make, stock, *how)
        if DEVICE.type == "cuda" and whole.run == "training":
            found[f"{name} fused SGD"] = functools.partial(make, stock, *how, _fused_sgd)
    return found


def _inputs(whole: Whole) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 60.0 if whole.network == "paper" else 1.0
    x = torch.randn(whole.batch, 3, *whole.variant.input_size, generator=generator) * scale
    labels = torch.randint(1000, (whole.batch,), generator=generator)
    return x.to(DEVICE, TRACKS[whole.track]), labels.to(DEVICE)


def _tolerance(whole: Whole) -> float:
    """Errors of eight layers. In training a rounding can move a gradient to another place, which the first layer's gradient
    feels even in fp32: torch's own two layouts were seen half a percent apart."""
    return max(0.02, 3 * _EPS[whole.track] ** 0.5) if whole.run == "training" else 32 * _EPS[whole.track] + 1e-5


def _row(whole: Whole, unit: str) -> dict[str, Any]:
    return {
        "section": "model",
        "case": whole.id if unit == "network" else f"{whole.id}/{unit}",
        "variant": whole.network,
        "unit": unit,
        "kind": "network",
        "pass": whole.run,
        "track": whole.track,
        "batch": whole.batch,
        "device": DEVICE.type,
        "flops": whole.flops,
        "bytes": whole.bytes,
        "contenders": {},
        "left out": {},
    }


def _peak_memory(builders: dict[str, Callable[[], list[Call]]], row: dict[str, Any]) -> None:
    """MiB above what was there before, of building each contender anew and calling it twice."""
    if DEVICE.type != "cuda":
        return
    for name, build in builders.items():
        entry = row["contenders"][name]
        if entry["status"] != "ok" or name.startswith(("compile", "max-autotune")):
            continue  # a second compilation would cost more than it tells
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (call,) = build()
        call()
        call()
        entry["peak MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        del call


@pytest.mark.parametrize("whole", _wholes(), ids=lambda whole: whole.id)
def test_network(whole: Whole, collect, budget, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> dict[str, Any]:
        row = _row(whole, "network")
        with precision(whole.track):
            weights, (x, labels) = _weights(whole), _inputs(whole)
            builders = _builders(whole, weights, x, labels, budget)
            exact = _truth(whole, weights, x, labels)
            measure_builders(row, builders, exact, _tolerance(whole), DEVICE, **_limits(budget))
            _peak_memory(builders, row)
        return row

    with tempfile.TemporaryDirectory() as cache:  # so that compile times are those of an empty cache
        if DEVICE.type == "cuda":
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
        row = collect(measure)
    ours = {name: entry for name, entry in row["contenders"].items() if name.startswith("ours")}
    assert all(entry["status"] == "ok" for entry in ours.values()), ours


def _limits(budget) -> dict[str, Any]:
    return {"seconds": 2 * budget.seconds, "samples": budget.samples, "sample_ms": budget.sample_ms}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", [128] if DEVICE.type == "cuda" else [16])
def test_two_devices(run: str, batch: int, collect, budget) -> None:
    """The paper's network in two towers, against itself on one device: on one device twice it can only lose."""
    whole = Whole("paper", run, "fp32", batch)
    devices = (
        tuple(torch.device("cuda", i % torch.cuda.device_count()) for i in range(2))
        if DEVICE.type == "cuda"
        else (DEVICE,) * 2
    )

    def measure() -> dict[str, Any]:
        row = _row(whole, "two devices") | {"devices": [str(d) for d in devices]}
        with precision(whole.track):
            weights, (x, labels) = _weights(whole), _inputs(whole)

            def one() -> models.AlexNet:
                model = models.alexnet(whole.variant)
                model.load_state_dict(weights)
                return model.to(DEVICE)

            def two() -> list[Call]:
                model = TwoDeviceAlexNet.from_one_device(one(), devices=devices)
                if run == "inference":
                    return [_call(whole, model, x, labels)]
                step = training_step(model.train(), x, labels)
                last = next(p for p in model.parameters() if p.dim() == 2 and p.shape[0] == whole.variant.num_classes)

                def train() -> torch.Tensor:
                    step()
                    return last.grad

                return [train]

            builders = {"ours two devices": two, "one device": lambda: [_one(one())]}

            def _one(model: models.AlexNet) -> Call:
                call = _call(whole, model, x, labels)
                return call if run == "inference" else lambda: call()[1]

            exact = _truth(whole, weights, x, labels)[-1:]
            measure_builders(row, builders, exact, _tolerance(whole), DEVICE, **_limits(budget))
        return row

    row = collect(measure)
    assert all(math.isfinite(c.get("error", math.nan)) for c in row["contenders"].values()), row["contenders"]
