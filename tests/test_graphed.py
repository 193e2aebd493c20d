"""Whole passes and steps as one graph: the same numbers, fresh results, errors that name both sides; on a CPU without graphs."""

from __future__ import annotations

import contextlib
import importlib
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from alexnet_kernels import models, nn, optim

module = importlib.import_module("alexnet_kernels.models.graphed")  # its name in the package is the function's


def network(device: torch.device, dropout: float = 0.0) -> torch.nn.Module:
    """A small one with each kind of layer."""
    features = (torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), nn.LocalResponseNorm(5), torch.nn.MaxPool2d(3, 2))
    classifier = (torch.nn.Linear(72, 16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 5))
    return nn.FusedSequential(*features, torch.nn.Flatten(), *classifier).to(device).eval()


def images(device: torch.device, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 9, 9, device=device)


def close(a: Tensor, b: Tensor) -> None:
    """Another batch size may be another algorithm: fp32, sums of some thousands."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 1, 4, 6, 100])
def test_the_models_own_numbers(micro_batch: int | None, device: torch.device) -> None:
    model, x = network(device), images(device)
    fast = models.graphed(model, torch.zeros_like(x), micro_batch)
    for batch in (x, x.flip(0), x.contiguous(memory_format=torch.channels_last)):
        close(fast(batch), model(batch))
    assert not fast(x).requires_grad
    assert fast.micro_batch == min(6, micro_batch or 6)


def test_micro_batches_go_through_one_after_another(device: torch.device) -> None:
    seen: list[int] = []
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).to(device).eval()
    model[1].register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    models.graphed(model, torch.zeros(7, 3, device=device), 3)
    assert seen[-3:] == [3, 3, 1]


def test_results_are_new_and_weights_are_seen(device: torch.device) -> None:
    model, x = network(device), images(device)
    fast = models.graphed(model, x, 4)
    first, kept = fast(x), fast(x)
    second = fast(x * 2)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    close(fast(x), model(x))
    assert not torch.equal(fast(x), first)


def test_what_fits_in_cache(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The largest activation of the paper's network is conv1's, 96 x 55 x 55: 68 images in bf16, 34 in fp32, in eights."""
    with torch.device("meta"):
        paper = models.alexnet("paper").eval()
        x = torch.empty(2, 3, 227, 227)
    assert module.images_in_cache(paper, x) == 32
    assert module.images_in_cache(paper.bfloat16(), x.bfloat16()) == 64
    layer = torch.nn.Linear(4, 8).to(device)
    assert [module.images_in_cache(layer, torch.zeros(3, 4, device=device))] == [module.CACHE_BYTES // 32 // 8 * 8]
    for limit, count in ((31, 1), (95, 2), (32 * 9, 8)):
        monkeypatch.setattr(module, "CACHE_BYTES", limit)
        assert module.images_in_cache(layer, torch.zeros(3, 4, device=device)) == count
    assert not layer._forward_hooks


def test_autocast_is_as_it_was(device: torch.device) -> None:
    model, x = torch.nn.Linear(4, 3).to(device).eval(), torch.randn(2, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        fast = models.graphed(model, x)
        expected = model(x)
    assert fast(x).dtype == torch.bfloat16 and torch.equal(fast(x), expected)
    plain = models.graphed(model, x)
    with torch.autocast(device.type, torch.bfloat16):
        assert plain(x).dtype == torch.float32


def test_made_in_inference_mode_and_called_outside(device: torch.device) -> None:
    """And the other way round: what a call is copied into belongs to neither."""
    model = network(device)
    with torch.inference_mode():
        x = images(device)
        fast = models.graphed(model, x)
        inside = fast(2 * x)
    outside = fast(torch.ones_like(x) * x * 2)
    assert torch.equal(inside, outside)
    with torch.inference_mode():
        assert torch.equal(fast(2 * x), outside)


def test_printed() -> None:
    model, x = network(torch.device("cpu")), images(torch.device("cpu"))
    assert repr(models.graphed(model, x, 4)) == (
        "Graphed(FusedSequential, [6, 3, 9, 9] torch.float32 on cpu, micro_batch=4, no graph on cpu)"
    )
    sgd = optim.SGD(model.parameters(), 0.1)
    step = models.graphed_step(model, TF.cross_entropy, sgd, (x, torch.zeros(6, dtype=torch.long)))
    assert repr(step) == "GraphedStep(FusedSequential, SGD, [6, 3, 9, 9] torch.float32 on cpu, no graph on cpu)"


class Pair(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


LINEAR = torch.nn.Linear(4, 2).eval()
X = torch.zeros(3, 4)
REFUSED: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "example must be a torch.Tensor, got list", lambda: models.graphed(LINEAR, [1.0])),
    (ValueError, r"example has shape \(0, 4\); a batch of at least one", lambda: models.graphed(LINEAR, X[:0])),
    (ValueError, "training mode.*call model.eval", lambda: models.graphed(torch.nn.Linear(4, 2), X)),
    (ValueError, "micro_batch=0 must be at least 1", lambda: models.graphed(LINEAR, X, 0)),
    (TypeError, "model returns tuple, not a tensor; wrap it", lambda: models.graphed(Pair().eval(), X, 2)),
    (ValueError, "model has tensors on cpu, the example is on meta", lambda: models.graphed(LINEAR, X.to("meta"))),
    (
        ValueError,
        r"x is \[2, 4\] torch.float32 on cpu, made for \[3, 4\] torch.float32 on cpu",
        lambda: models.graphed(LINEAR, X)(X[:2]),
    ),
    (
        ValueError,
        r"x is \[3, 4\] torch.float64 on cpu, made for \[3, 4\] torch.float32",
        lambda: models.graphed(LINEAR, X)(X.double()),
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_refused(kind: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_refused_once_it_trains() -> None:
    model = torch.nn.Linear(4, 2).eval()
    fast = models.graphed(model, X)
    model.train()
    with pytest.raises(RuntimeError, match=r"model, or a module in it, is in training mode now; call model.eval\(\)"):
        fast(X)


def test_refused_once_a_module_in_it_trains() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout()).eval()
    fast = models.graphed(model, X)
    model[1].train()
    with pytest.raises(RuntimeError, match="model, or a module in it, is in training mode now"):
        fast(X)


def test_weights_that_move_are_found() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    weights = module._Weights(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.load_state_dict(model.state_dict())
    assert not weights.have_moved()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert weights.have_moved()
    weights = module._Weights(model)
    model[1].running_mean.data = torch.zeros(2)
    assert weights.have_moved()
    weights = module._Weights(model)
    model[0].bias = None
    assert weights.have_moved()


# -------------------------------------------------------------------------------------------------------- training step


def twins(device: torch.device, dropout: float = 0.0) -> list[torch.nn.Module]:
    made = [network(device, dropout).train() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made


def batches(device: torch.device, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(device, 4), torch.randint(5, (4,), device=device)) for _ in range(count)]


@pytest.mark.parametrize("kind", [optim.SGD, torch.optim.SGD])
def test_steps_of_a_loop(kind: Any, device: torch.device) -> None:
    """Eight steps, with a scheduler that changes the rate: losses, weights and momenta of a loop of one's own."""
    model, own = twins(device)
    made = [kind(m.parameters(), 0.05, momentum=0.9, weight_decay=5e-4) for m in (model, own)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.1) for optimizer in made]
    data = batches(device, 8)
    step = models.graphed_step(model, TF.cross_entropy, made[0], data[0])
    losses = []
    for x, target in data:
        losses.append(step(x, target))
        made[1].zero_grad()
        expected = TF.cross_entropy(own(x), target)
        expected.backward()
        made[1].step()
        torch.testing.assert_close(losses[-1], expected.detach(), rtol=1e-4, atol=1e-5)
        for schedule in schedules:
            schedule.step()
    assert len({float(loss) for loss in losses}) == 8 and not losses[0].requires_grad
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


class Recorded:
    """Enough of a CUDA graph: its replay is the step."""

    def __init__(self, step: models.GraphedStep, output: Tensor, log: list[str]) -> None:
        self.step, self.output, self.log = step, output, log

    def replay(self) -> None:
        self.log.append("replay")
        self.output.copy_(self.step._step())
        self.step._held = self.step._numbers()  # a graph's own writes count no version


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When a step on a GPU would run as it is, be captured, and be replayed; each is done on the CPU instead."""
    seen: list[str] = []

    def captured(step: models.GraphedStep) -> tuple[Recorded, Tensor]:
        seen.append("capture")
        output = torch.zeros((), dtype=step._inputs.dtype)
        return Recorded(step, output, seen), output

    monkeypatch.setattr(module, "_beside", lambda _, function: seen.append("as it is") or function())
    monkeypatch.setattr(models.GraphedStep, "_captured", captured)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_a_step_is_captured(dtype: torch.dtype, log: list[str]) -> None:
    """After three; anew, after one, where something changed that a graph would not see. The losses are a loop's own."""
    device = torch.device("cpu")
    model, own = (net.to(dtype) for net in twins(device))
    made = [optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, own)]
    x, target = batches(device, 1)[0]
    step = models.graphed_step(model, TF.cross_entropy, made[0], (x.to(dtype), target))
    step._capturable = True

    def run(times: int) -> list[str]:
        log.clear()
        for _ in range(times):
            made[1].zero_grad()
            expected = TF.cross_entropy(own(x.to(dtype)), target)
            expected.backward()
            made[1].step()
            torch.testing.assert_close(step(x.to(dtype), target), expected.detach())
        return list(log)

    assert repr(step).endswith("a CUDA graph after 3 more calls)")
    assert run(5) == ["as it is"] * 3 + ["capture", "replay", "replay"]
    assert repr(step).endswith("one CUDA graph)")
    for optimizer in made:
        optimizer.param_groups[0]["lr"] = 0.01
    assert run(3) == ["as it is", "capture", "replay", "replay"]
    with torch.no_grad():
        for net in (model, own):
            net[0].bias.fill_(0.25)
    assert run(3) == (["as it is", "capture", "replay", "replay"] if dtype == torch.bfloat16 else ["replay"] * 3)
    for net in (model, own):
        net.eval()
    assert run(2) == ["as it is", "capture", "replay"]
    for net in (model, own):
        net[0].bias.data = net[0].bias.data.clone()
    assert run(2) == ["as it is", "capture", "replay"]
    for optimizer in made:
        optimizer.load_state_dict(optimizer.state_dict())
    assert run(3) == ["as it is", "capture", "replay", "replay"]
    for net in (model, own):
        net[0].bias.requires_grad_(False)
    assert run(2) == ["as it is", "capture", "replay"]


def test_a_step_names_what_does_not_fit(device: torch.device) -> None:
    model, _ = twins(device)
    (x, target), sgd = batches(device, 1)[0], optim.SGD(model.parameters(), 0.1)
    step = models.graphed_step(model, TF.cross_entropy, sgd, (x, target))
    with pytest.raises(ValueError, match=r"targets is \[3\] torch.int64 on .*, made for \[4\] torch.int64"):
        step(x, target[:3])
    with pytest.raises(ValueError, match=r"inputs is \[4, 3, .*torch.float64 .*, made for .*torch.float32"):
        step(x.double(), target)
    with pytest.raises(TypeError, match=r"example\[1\] must be a torch.Tensor, got int"):
        models.graphed_step(model, TF.cross_entropy, sgd, (x, 3))  # type: ignore[arg-type]


def test_a_capture_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own capture stream belongs to the device of a process's first capture; a pinning loader must not end a capture."""
    seen: list[Any] = []

    def graph(graph: str, *, stream: Any, capture_error_mode: str) -> Any:
        seen.append((graph, stream, capture_error_mode))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream on {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    second = torch.device("cuda", 1)
    with module._capture("a graph", second):
        pass
    assert seen == [second, ("a graph", "a stream on cuda:1", "thread_local")]


# ------------------------------------------------------------------------------------------------------------ real graphs


@pytest.mark.gpu
def test_a_weight_elsewhere_is_an_error() -> None:
    model = torch.nn.Linear(4, 2).cuda().eval()
    fast = models.graphed(model, X.cuda())
    assert repr(fast).endswith("one CUDA graph)")
    model.weight = torch.nn.Parameter(model.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"a weight lies elsewhere.*call graphed again"):
        fast(X.cuda())


@pytest.mark.gpu
def test_the_fourth_step_is_captured() -> None:
    device = torch.device("cuda")
    model, _ = twins(device, dropout=0.5)
    sgd = optim.SGD(model.parameters(), 0.0, momentum=0.5)
    x, target = batches(device, 1)[0]
    step = models.graphed_step(model, TF.cross_entropy, sgd, (x, target))
    seen = []
    for _ in range(5):
        seen.append(repr(step).rsplit(", ", 1)[1])
        step(x, target)
    assert seen == [f"a CUDA graph after {n} more calls)" for n in (3, 2, 1, 0)] + ["one CUDA graph)"]
    losses = {float(step(x, target)) for _ in range(4)}
    assert len(losses) > 1  # the rate is 0: only dropout's masks differ
    sgd.param_groups[0]["lr"] = 0.1
    before = [p.detach().clone() for p in model.parameters()]
    step(x, target)
    step(x, target)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.gpu
def test_an_optimiser_that_counts_on_the_cpu() -> None:
    layer = torch.nn.Linear(4, 2).cuda()
    with pytest.raises(ValueError, match="optimizer=Adam counts its steps outside the device; make it with capturable"):
        models.graphed_step(layer, TF.cross_entropy, torch.optim.Adam(layer.parameters()), (X.cuda(), X[:, 0].cuda()))


@pytest.mark.two_gpu
def test_one_graph_on_each_device() -> None:
    for index in (0, 1):
        device = torch.device("cuda", index)
        model, x = network(device), images(device)
        fast = models.graphed(model, torch.zeros_like(x))
        close(fast(x), model(x))
        close(fast(2 * x), model(2 * x))


@pytest.mark.gpu
def test_a_loader_may_pin_memory_during_a_capture() -> None:
    """In another thread, as ``DataLoader(pin_memory=True)`` does."""
    device = torch.device("cuda")
    model, x = network(device), images(device)
    pinned: list[Tensor] = []

    def pin(*_: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=lambda: pinned.append(torch.empty(1 << 22).pin_memory()))
            thread.start()
            thread.join()

    model[0].register_forward_hook(pin)
    fast = models.graphed(model, torch.zeros_like(x))
    assert len(pinned) == 1
    close(fast(x), model(x))
