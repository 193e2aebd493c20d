"""``make gpu``: everything that needs a GPU, in one run, without a network: tests, ceilings, LRN, the comparison.

    python -m bench.gpu --out DIR [--only PART ...]

Needs torch, triton, pytest, typer and rich, no installation of the package. Writes ``gpu.json`` (rewritten after each part,
so that an interrupted run keeps what it has), ``gpu.log`` and ``compare.json`` into DIR. A part that fails is reported and
the rest goes on. Exits 0, 1 when a part failed, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as TF

from alexnet_kernels import functional as F
from alexnet_kernels import reference, use_backend
from alexnet_kernels._files import write_text
from alexnet_kernels.comparison.run import environment

BATCH = 256
COLD = 1 << 28  # bytes of buffers to rotate among: more than four times an H200's L2


def milliseconds(calls: list[Callable[[], object]], samples: int = 20) -> dict[str, float]:
    """Median and quartile distance of one call, from a graph that replays ``calls`` (the same work on rotating buffers)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    found = []
    for _ in range(samples + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / len(calls))
    low, median, high = statistics.quantiles(found[3:], n=4)
    return {"milliseconds": median, "iqr": high - low}


def tests(out: Path) -> list[dict[str, object]]:
    """The tests marked gpu (and two_gpu), slow ones too."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu or two_gpu",
        "--run-slow",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return [{"case": "tests", "summary": done.stdout.strip().splitlines()[-1]}]


def ceilings(out: Path) -> list[dict[str, object]]:
    """What this card can do at best: matrix products and a device copy."""
    rows: list[dict[str, object]] = []
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        timing = milliseconds([lambda a=a, b=b: a @ b])
        rows.append({"case": f"matmul 8192 {name}", **timing, "tflops": 2 * 8192**3 / timing["milliseconds"] / 1e9})
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    timing = milliseconds([lambda: target.copy_(source)])
    rows.append({"case": "copy 4 GiB", **timing, "gbps": 2 * source.nbytes / timing["milliseconds"] / 1e6})
    return rows


def lrn(out: Path) -> list[dict[str, object]]:
    """LRN at the network's two places, forward and backward: ours, torch eager, torch.compile, and the copy as the floor."""
    rows = []
    compiled = torch.compile(lambda x: TF.local_response_norm(x, 5, k=2.0))
    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ours": lambda x: F.local_response_norm(x, 5, k=2.0),
        "torch": lambda x: TF.local_response_norm(x, 5, k=2.0),
        "torch.compile": compiled,
    }
    for place, shape in (("norm1", (BATCH, 96, 55, 55)), ("norm2", (BATCH, 256, 27, 27))):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for layout in (torch.contiguous_format, torch.channels_last):
                rows += _lrn_rows(place, shape, dtype, layout, contenders)
    return rows


def _lrn_rows(place, shape, dtype, layout, contenders) -> list[dict[str, object]]:
    x = (torch.randn(shape, device="cuda").relu() * 20).to(dtype).contiguous(memory_format=layout)
    g = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
    copies = max(2, -(-COLD // (2 * x.nbytes)))
    inputs = [x.clone() for _ in range(copies)]
    args = (5, 1e-4 / 5, 0.75, 2.0, 1)
    truth = reference.lrn(x[:4].double(), *args)
    truth_grad = reference.lrn_backward(g[:4].double(), x[:4].double(), *args)
    rows = []
    for who, call in contenders.items():
        with use_backend("triton" if who == "ours" else "auto"), torch.no_grad():
            row = {"case": place, "pass": "forward", "who": who, "dtype": str(dtype)[6:], "layout": str(layout)[6:]}
            error = float((call(x)[:4].double() - truth).norm() / truth.norm())
            timing = milliseconds([lambda t=t, call=call: call(t) for t in inputs])
            rows.append({**row, **timing, "error": error, "gbps": 2 * x.nbytes / timing["milliseconds"] / 1e6})
        with use_backend("triton" if who == "ours" else "auto"):
            leaves = [t.requires_grad_() for t in (x.clone() for _ in range(copies))]
            outputs = [call(t) for t in leaves]
            grads = [
                torch.autograd.grad(y, t, g, retain_graph=True)[0] for y, t in zip(outputs[:1], leaves[:1], strict=True)
            ]
            error = float((grads[0][:4].double() - truth_grad).norm() / truth_grad.norm())
            timing = _eager(
                [
                    lambda y=y, t=t: torch.autograd.grad(y, t, g, retain_graph=True)
                    for y, t in zip(outputs, leaves, strict=True)
                ]
            )
            row = {**row, "pass": "backward", "timed": "eager, events around all calls"}
            rows.append({**row, **timing, "error": error, "gbps": 3 * x.nbytes / timing["milliseconds"] / 1e6})
    return rows


def _eager(calls: list[Callable[[], object]], samples: int = 20) -> dict[str, float]:
    """As :func:`milliseconds` without a graph, for autograd, whose threads choose their own streams."""
    found = []
    for _ in range(samples + 3):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / len(calls))
    low, median, high = statistics.quantiles(found[3:], n=4)
    return {"milliseconds": median, "iqr": high - low}


def compare(out: Path) -> list[dict[str, object]]:
    """``alexnet-kernels compare`` in fp32, tf32 and bf16, on noise where scikit-image has no photographs."""
    from PIL import Image

    from alexnet_kernels import images

    try:
        pictures = [str(p) for p in images.default_photographs()]
    except FileNotFoundError:
        noise = torch.randint(0, 256, (300, 300, 3), dtype=torch.uint8)
        Image.frombytes("RGB", (300, 300), bytes(noise.flatten().tolist())).save(out / "noise.png")
        pictures = [str(out / "noise.png")]
    rows: list[dict[str, object]] = []
    for dtype in ("fp32", "tf32", "bf16"):
        command = [sys.executable, "-m", "alexnet_kernels", "compare", *pictures, "--dtype", dtype, "--batch", "128"]
        done = subprocess.run([*command, "--json", str(out / "compare.json")], capture_output=True, text=True)
        print(done.stdout, done.stderr[-2000:])
        if done.returncode not in (0, 1):
            raise RuntimeError(f"compare --dtype {dtype} ended with {done.returncode}")
        result = json.loads((out / "compare.json").read_text())
        rows += [{"case": f"compare {dtype}", **row} for row in result["rows"]]
        if done.returncode:
            rows.append({"case": f"compare {dtype}", "failed": "results disagree with fp64"})
    return rows


PARTS = {part.__name__: part for part in (tests, ceilings, lrn, compare)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing to run")
        return 3
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment([torch.device("cuda:0")]),
        "parts": {},
    }
    failed = False
    with (out / "gpu.log").open("w") as log:
        for name in arguments.only:
            began = time.perf_counter()
            try:
                rows: list[dict[str, object]] = PARTS[name](out)
            except Exception:
                failed, rows = True, [{"case": name, "failed": traceback.format_exc()}]
            seconds = round(time.perf_counter() - began, 1)
            result["parts"][name] = {"seconds": seconds, "rows": rows}  # type: ignore[index]
            write_text(out / "gpu.json", json.dumps(result, indent=1) + "\n")
            for row in rows:
                print(row, file=log)
                print(row)
            print(f"== {name}: {seconds} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
