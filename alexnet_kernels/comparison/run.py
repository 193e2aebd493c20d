"""Compare: check every contender against fp64, time them in turns, group by group and whole, and tell what ran."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import optim
from ..distributed.exchange import Transfer
from ..geometry import Variant
from ..images import Loaded, prepare
from ..models import AlexNet, TwoDeviceAlexNet, alexnet
from ..profiling.monitor import GpuMonitor, Usage
from ..profiling.timer import Timing, interleave
from .check import FORWARD, PIXELS, TOTAL, TRAINING, Errors, check
from .contenders import Contender, OneDevice, State, TwoDevices
from .memory import keep_freed_memory
from .stock import stock_alexnet

STOCK, ONE, TWO = "torch.nn", "one device", "two devices"
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str], None]
_KINDS = ("cpu", "cuda", "mps", "xpu")
_NOTE_PIXELS = (
    f"'{PIXELS}' begins with 8-bit images in the host's memory, copied to the device as they are; {STOCK} prepares them there, "
    "ours on the way into conv1. All other rows begin with prepared images"
)
_NOTE_STEP = f"'{TOTAL}' of a training step has the optimiser too: torch.optim.SGD for {STOCK}, this package's for ours"
_NOTE_MEMORY = (
    "'peak memory' is the whole process's on a CPU and the whole card's on a GPU, with all three networks alive: no "
    "contender's own"
)


@dataclass(frozen=True)
class Row:
    """One contender on one fused group (or the total): milliseconds a batch, and the worst error of its tensors.

    ``ratio`` is the stock network's time over this one's; ``error`` a relative L2 distance from fp64, of the output for
    a forward row and of the gradient that is furthest off for a training row, held to ``tolerance``.
    """

    group: str
    run: str
    contender: str
    milliseconds: float
    iqr: float
    ratio: float
    backend: str
    error: float
    tolerance: float
    worst: str

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance  # a NaN does not


@dataclass(frozen=True)
class Comparison:
    """The whole result; ``to_json`` gives what ``--json`` writes."""

    variant: str
    batch: int
    dtype: str
    devices: tuple[str, str]
    images: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    environment: dict[str, str]
    rows: tuple[Row, ...]
    usage: dict[str, tuple[Usage, ...]]
    transfers: tuple[Transfer, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def disagreements(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.agrees)

    def to_json(self) -> dict[str, object]:
        return {"schema": 1, **asdict(self)}


def compare(
    variant: Variant,
    images: Loaded,
    *,
    batch: int,
    dtype: str = "fp32",
    devices: tuple[torch.device, torch.device],
    rounds: int = 5,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Comparison:
    """Run the comparison. On a CPU this process keeps the memory that it frees from then on (:func:`keep_freed_memory`).

    Args:
        variant: which network.
        images: photographs, already fitted to ``variant``.
        batch: images a step; the photographs are repeated to fill it.
        dtype: ``"fp32"`` (strict), ``"tf32"`` (CUDA), ``"bf16"``, ``"fp16"``.
        devices: of the two towers; stock and one-device networks run on the first.
        rounds: samples of each time.
        seed: of weights, labels and dropout.
        progress: called with a few words before each part.

    Raises:
        ValueError: ``dtype`` unknown or not of this device, or ``batch`` below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}")
    if dtype == "tf32" and devices[0].type != "cuda":
        raise ValueError(f"dtype='tf32' needs a CUDA device, not {devices[0]}; use fp32")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1 to be timed")
    if any(device.type == "cpu" for device in devices):
        keep_freed_memory()
    with _precision(dtype):
        progress("weights")
        contenders = _contenders(variant, devices, DTYPES[dtype], seed)
        pixels = images.batch(batch, pinned=devices[0].type == "cuda")
        inputs = prepare(pixels.to(devices[0]), variant.preprocess, DTYPES[dtype]).contiguous()
        labels = torch.randint(variant.num_classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(
            devices[0]
        )
        progress("fp64 reference")
        errors, transfers = check(contenders, inputs, pixels, dtype, progress)
        rows = [*_time_forward(contenders, inputs, pixels, rounds, errors, progress)]
        rows += _time_training(contenders, inputs, pixels, labels, rounds, errors, progress)
        usage, notes = _watch(contenders, inputs, labels, devices, progress)
    return Comparison(
        variant.name,
        batch,
        dtype,
        (str(devices[0]), str(devices[1])),
        images.names,
        images.skipped,
        environment(devices),
        tuple(rows),
        usage,
        transfers,
        (_NOTE_PIXELS, _NOTE_STEP, _NOTE_MEMORY, *notes),
    )


def environment(devices: Sequence[torch.device]) -> dict[str, str]:
    """The machine and the software, for a result that explains itself."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    for device in dict.fromkeys(devices):
        if device.type == "cuda":
            found[str(device)] = torch.cuda.get_device_name(device)
            found["cuda"] = str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
    return found


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """Strict fp32, or tf32 allowed, for every contender alike; cuDNN may choose its fastest algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    allow, before = dtype == "tf32", matmul.allow_tf32
    with cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=allow):
        matmul.allow_tf32 = allow
        try:
            yield
        finally:
            matmul.allow_tf32 = before


def _contenders(
    variant: Variant, devices: tuple[torch.device, torch.device], dtype: torch.dtype, seed: int
) -> tuple[Contender, ...]:
    """Stock, ours on one device, ours on two, with the same weights.

    Drawn after He et al. (2015), so that activations keep their size through the layers, LRN has something to do and
    gradients mean something in half types too; with the paper's own draw most of them would be ties in bf16.
    """
    ours, generator = alexnet(variant), torch.Generator().manual_seed(seed)
    for name, parameter in ours.named_parameters():
        with torch.no_grad():
            std = 0.1 if name.endswith("bias") else (2 / parameter[0].numel()) ** 0.5
            parameter.normal_(0.0, std, generator=generator)
    stock = stock_alexnet(variant)
    stock.load_state_dict(ours.state_dict())
    two = TwoDeviceAlexNet.from_one_device(ours, devices=devices).to(dtype)
    return (
        OneDevice(STOCK, stock.to(devices[0], dtype), takes_pixels=False),
        OneDevice(ONE, ours.to(devices[0], dtype)),
        TwoDevices(TWO, two),
    )


def _time_forward(
    contenders: Sequence[Contender],
    inputs: Tensor,
    pixels: Tensor,
    rounds: int,
    errors: Errors,
    progress: Progress,
) -> Iterator[Row]:
    with torch.inference_mode():
        for c in contenders:
            c.model.eval()
        states: dict[str, State] = {c.name: c.enter(inputs) for c in contenders}
        for group in contenders[0].variant.groups:
            progress(f"{FORWARD}: {group.name}")
            calls = {c.name: _forward_call(c, group.name, states[c.name]) for c in contenders}
            yield from _rows(group.name, FORWARD, _time(calls, contenders, rounds), errors)
            states = {c.name: c.run_group(group.name, states[c.name]) for c in contenders}
        progress(f"{FORWARD}: {TOTAL}")
        whole = {c.name: partial(c.model, inputs) for c in contenders}
        yield from _rows(TOTAL, FORWARD, _time(whole, contenders, rounds), errors)
        progress(f"{FORWARD}: {PIXELS}")
        whole = {c.name: partial(c.from_pixels, pixels) for c in contenders}
        yield from _rows(PIXELS, FORWARD, _time(whole, contenders, rounds), errors)


def _forward_call(contender: Contender, group: str, state: State) -> Callable[[], object]:
    return lambda: contender.run_group(group, list(state))


def _time_training(
    contenders: Sequence[Contender],
    inputs: Tensor,
    pixels: Tensor,
    labels: Tensor,
    rounds: int,
    errors: Errors,
    progress: Progress,
) -> Iterator[Row]:
    """A group's row: forward, and backward from a gradient of ones; the totals: a step of SGD with momentum, loss included."""
    for c in contenders:
        c.model.train()
    with torch.no_grad():
        states: dict[str, State] = {c.name: c.enter(inputs) for c in contenders}
    for group in contenders[0].variant.groups:
        progress(f"{TRAINING}: {group.name}")
        first = group is contenders[0].variant.groups[0]
        calls = {c.name: _training_call(c, group.name, states[c.name], needs_input=not first) for c in contenders}
        yield from _rows(group.name, TRAINING, _time(calls, contenders, rounds), errors)
        with torch.no_grad():
            states = {c.name: c.run_group(group.name, states[c.name]) for c in contenders}
    progress(f"{TRAINING}: {TOTAL}")
    steps = {c.name: training_step(c.model, inputs, labels, sgd=_sgd_of(c)) for c in contenders}
    yield from _rows(TOTAL, TRAINING, _time(steps, contenders, rounds), errors)
    progress(f"{TRAINING}: {PIXELS}")
    steps = {c.name: training_step(c.model, pixels, labels, c.from_pixels, _sgd_of(c)) for c in contenders}
    yield from _rows(PIXELS, TRAINING, _time(steps, contenders, rounds), errors)


def _training_call(contender: Contender, group: str, state: State, *, needs_input: bool) -> Callable[[], object]:
    leaves = [t.detach().clone().requires_grad_(needs_input) for t in state]

    def call() -> None:
        contender.model.zero_grad(set_to_none=True)
        out = contender.run_group(group, list(leaves))
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])
        for leaf in leaves:
            leaf.grad = None

    return call


def _sgd_of(contender: Contender) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser that a user of the contender has."""
    return torch.optim.SGD if contender.name == STOCK else optim.SGD


def training_step(
    model: AlexNet | TwoDeviceAlexNet | torch.nn.Module,
    inputs: Tensor,
    labels: Tensor,
    forward: Callable[[Tensor], Tensor] | None = None,
    sgd: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> Callable[[], None]:
    """One step of SGD with momentum on a batch: forward (``model`` itself, or what runs it), cross-entropy, backward, update.
    The learning rate is zero, so that every step does the same work on the same weights."""
    run = model if forward is None else forward
    optimiser = sgd(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(run(inputs).float(), labels).backward()
        optimiser.step()

    return step


def _time(calls: Mapping[str, Callable[[], object]], contenders: Sequence[Contender], rounds: int) -> dict[str, Timing]:
    devices = {p.device for c in contenders for p in c.model.parameters()}
    return interleave(calls, rounds=rounds, warmup=1, devices=tuple(devices))


def _rows(group: str, run: str, timings: dict[str, Timing], errors: Errors) -> Iterator[Row]:
    stock = timings[STOCK].median
    for name, timing in timings.items():
        e = errors[name, group, run]
        ratio = stock / timing.median
        yield Row(group, run, name, timing.median, timing.iqr, ratio, e.backend, e.value, e.allowed, e.tensor)


def _watch(
    contenders: Sequence[Contender],
    inputs: Tensor,
    labels: Tensor,
    devices: tuple[torch.device, torch.device],
    progress: Progress,
) -> tuple[dict[str, tuple[Usage, ...]], tuple[str, ...]]:
    """What the devices did during a few training steps of each contender."""
    usage: dict[str, tuple[Usage, ...]] = {}
    notes: set[str] = set()
    for c in contenders:
        progress(f"utilisation: {c.name}")
        step = training_step(c.model.train(), inputs, labels, sgd=_sgd_of(c))
        used = devices if c.name == TWO else devices[:1]
        gpu = any(d.type == "cuda" for d in used)
        step()
        with GpuMonitor(used) as monitor:
            interleave({c.name: step}, rounds=1000 if gpu else 2, seconds=1.0, warmup=0, devices=used)
        usage[c.name] = monitor.usage
        notes.update(monitor.notes)
    return usage, tuple(sorted(notes))


def parse_devices(text: str | None) -> tuple[tuple[torch.device, torch.device], str]:
    """The two devices of ``"cuda:0,cuda:1"``, or those that are there, and a line that says which and why.

    Raises:
        ValueError: ``text`` does not name two devices that can be timed.
    """
    if text is not None:
        names = [name.strip() for name in text.split(",")]
        if len(names) != 2:
            raise ValueError(f"devices={text!r} must name two devices with a comma between them, as in cpu,cpu")
        try:
            pair = torch.device(names[0]), torch.device(names[1])
        except RuntimeError as error:
            raise ValueError(f"devices={text!r}: {str(error).splitlines()[0]}") from error
        for device in pair:
            if device.type not in _KINDS:
                raise ValueError(f"devices={text!r}: nothing runs on {device}; use {', '.join(_KINDS)}")
        return pair, f"devices: {names[0]} and {names[1]}, as asked"
    count = torch.cuda.device_count()
    if count == 0:
        return (torch.device("cpu"),) * 2, "devices: no GPU is visible, so both towers run on the CPU (cpu,cpu)"
    if count == 1:
        return (
            torch.device("cuda:0"),
        ) * 2, "devices: one GPU is visible, the towers share it on two streams (cuda:0,cuda:0)"
    return (
        torch.device("cuda:0"),
        torch.device("cuda:1"),
    ), f"devices: {count} GPUs are visible, cuda:0 and cuda:1 are used"
