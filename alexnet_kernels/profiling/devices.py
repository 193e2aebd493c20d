"""The devices that a monitor is asked to watch: their labels, and the boards that NVML knows them by."""

from __future__ import annotations

import torch

from .nvml import Board, Nvml

CPU = "cpu"


def label_of(device: torch.device | str | int) -> str:
    """How it is called in every table.

    >>> label_of(torch.device("cuda", 1)), label_of("1"), label_of("cpu")
    ('cuda:1', 'cuda:1', 'cpu')
    """
    text = str(device).strip()
    if text.isdecimal():
        return f"cuda:{int(text)}"
    if text.startswith(("GPU-", "MIG-")):
        return text
    if text == "cuda":
        return f"cuda:{torch.cuda.current_device() if torch.cuda.is_available() else 0}"
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise ValueError(
            f"devices: {text!r} is none; name cpu, a GPU as in cuda:0 or 0, or a UUID as in GPU-8c2a..."
        ) from None


def choose(asked: list[str] | None, nvml: Nvml) -> dict[str, Board | None]:
    """The board of each label (of all that are visible, and the CPU, where none is asked for); the CPU has none, and stands for
    a device that NVML does not count.

    Raises:
        ValueError: a device that is not there.
    """
    visible = {f"cuda:{i}": board for i, board in enumerate(nvml.visible())}
    if asked is None:
        return {**visible, CPU: None}
    found: dict[str, Board | None] = {}
    for label in asked:
        if label.startswith(("GPU-", "MIG-")):
            named = [b for board in nvml.boards for b in (board, *board.instances) if b.uuid.startswith(label)]
            if len(named) != 1:
                raise ValueError(f"devices: {label!r} names {len(named)} GPUs of {[b.uuid for b in nvml.boards]}")
            found[label] = named[0]
        elif label.startswith("cuda:"):
            if label not in visible:
                raise ValueError(f"devices: {label} is not there; visible: {', '.join(visible) or 'no GPU'}")
            found[label] = visible[label]
        else:
            check_there(label)
            found[CPU] = None
    return found


def check_there(label: str) -> None:
    """Without NVML: that torch knows the device.

    Raises:
        ValueError: it does not.
    """
    kind, _, index = label.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if label.startswith(("GPU-", "MIG-")):
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(gpus)]
        there = sum(uuid.startswith(label[4:]) for uuid in uuids) == 1
    elif kind == "cuda":
        there = int(index) < gpus
    else:
        module = getattr(torch, kind, None)
        there = bool(module is not None and hasattr(module, "is_available") and module.is_available())
    if not there:
        seen = ", ".join([CPU, *(f"cuda:{i}" for i in range(gpus))])
        raise ValueError(f"devices: {label} is not there; torch sees {seen}")
