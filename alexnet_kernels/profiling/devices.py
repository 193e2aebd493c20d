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
    """The board of each label (of all that are visible, and the CPU, where none is asked for); None without NVML counters.

    Raises:
        ValueError: a GPU that is not there.
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
            found[label] = None
    return found
