"""NVML through ``nvidia-ml-py``: which GPUs a program sees, and the counters of each.

NVML's numbering ignores ``CUDA_VISIBLE_DEVICES``, so devices are matched by UUID: torch's, where CUDA works, and otherwise
``CUDA_VISIBLE_DEVICES`` read against NVML's own list, by CUDA's rules. A counter that a device does not have (MIG, older
boards) is NaN here and N/A to people, never an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

# What is sampled. Rates are seen from the GPU: "tx" leaves it.
QUANTITIES = (
    "utilisation",
    "memory_mib",
    "power_w",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
    "pcie_tx_mib_s",
    "pcie_rx_mib_s",
    "nvlink_tx_mib_s",
    "nvlink_rx_mib_s",
    "throttle",
)
REASONS = {  # nvmlClocksEventReason*: NVML's bits, in words
    0x1: "idle",
    0x2: "clocks set by user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
NOT_HELD_BACK = 0x1  # an idle GPU clocks down because nobody asks for more

# Errors that come again: invalid argument, not supported, no permission, not found, no such function, wrong version, deprecated
_ABSENT = (2, 3, 4, 6, 13, 25, 26)
_LOST = 15  # NVML_ERROR_GPU_IS_LOST
_ALL_LINKS = 0xFFFFFFFF
# Counters read in one call. PCIE_COUNT takes 0.3 ms, nvmlDeviceGetPcieThroughput blocks 20 ms in each direction;
# POWER_INSTANT is the power now, nvmlDeviceGetPowerUsage a mean over one second (Ampere and newer).
_POWER, _NVLINK_TX, _NVLINK_RX, _PCIE_TX, _PCIE_RX = 186, 138, 139, 197, 198
_FIELDS = {_POWER: 0, _NVLINK_TX: _ALL_LINKS, _NVLINK_RX: _ALL_LINKS, _PCIE_TX: 0, _PCIE_RX: 0}
_RATES = {  # cumulative counters: the quantity, and MiB in one unit
    _NVLINK_TX: ("nvlink_tx_mib_s", 2**-10),
    _NVLINK_RX: ("nvlink_rx_mib_s", 2**-10),
    _PCIE_TX: ("pcie_tx_mib_s", 2**-20),
    _PCIE_RX: ("pcie_rx_mib_s", 2**-20),
}
_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class NvmlMissing(RuntimeError):
    """NVML cannot be used; the message says why, in one line."""


class GpuLost(RuntimeError):
    """The GPU has fallen off the bus."""


@dataclass(frozen=True)
class Board:
    """A GPU of NVML's list, or a MIG instance of one."""

    uuid: str
    name: str
    handle: Any = field(repr=False, compare=False)
    mig: bool = False
    instances: tuple[Board, ...] = ()


def throttle_words(bits: int) -> tuple[str, ...]:
    """Why the clocks are below their maximum.

    >>> throttle_words(0x4 | 0x40)
    ('power cap', 'too hot (hardware)')
    """
    known = tuple(word for bit, word in REASONS.items() if bits & bit)
    rest = bits & ~sum(REASONS)
    return (*known, f"reason {rest:#x}") if rest else known


def visible_boards(text: str | None, boards: Sequence[Board]) -> list[Board]:
    """What ``CUDA_VISIBLE_DEVICES=text`` leaves of ``boards``, in its order, by CUDA's rules.

    Indices or (abbreviated) UUIDs, not mixed; the first that names nothing ends the list; one named twice empties it. A
    GPU in MIG mode stands for its first instance, as it does for CUDA.
    """
    whole = [board.instances[0] if board.instances else board for board in boards]
    if text is None:
        return whole
    tokens = [token.strip() for token in text.split(",")]
    everything = [b for board in boards for b in (board, *board.instances)]
    by_uuid = tokens[0].startswith(("GPU-", "MIG-"))
    found: list[Board] = []
    for token in tokens:
        if by_uuid:
            named = [b for b in everything if token.startswith(("GPU-", "MIG-")) and b.uuid.startswith(token)]
            board = named[0] if len(named) == 1 else None
            if board is not None and board.instances:
                board = board.instances[0]
        else:
            board = whole[int(token)] if token.isdecimal() and int(token) < len(whole) else None
        if board is None:
            break
        if board in found:
            return []
        found.append(board)
    return found


class Nvml:
    """An open NVML. Call ``close`` when done.

    Raises:
        NvmlMissing: no nvidia-ml-py, no driver, or a driver that does not answer.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise NvmlMissing("nvidia-ml-py is not installed (pip install 'alexnet-kernels[profile]')") from None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlMissing(f"NVML does not answer ({error})") from error
        self.library = pynvml
        self.notes: list[str] = []
        self.boards = self._list()

    def close(self) -> None:
        self.library.nvmlShutdown()

    def _list(self) -> tuple[Board, ...]:
        boards = []
        for index in range(self.library.nvmlDeviceGetCount()):
            try:
                handle = self.library.nvmlDeviceGetHandleByIndex(index)
                uuid, name = self.library.nvmlDeviceGetUUID(handle), self.library.nvmlDeviceGetName(handle)
            except self.library.NVMLError as error:
                self.notes.append(f"NVML's GPU {index} does not answer ({error})")
                boards.append(Board(f"(unknown {index})", "N/A", None))
                continue
            boards.append(Board(uuid, name, handle, instances=self._instances(handle, name)))
        return tuple(boards)

    def _instances(self, handle: Any, name: str) -> tuple[Board, ...]:
        nvml, found = self.library, []
        try:
            if not nvml.nvmlDeviceGetMigMode(handle)[0]:
                return ()
            count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except nvml.NVMLError:  # a board that knows no MIG
            return ()
        for index in range(count):
            try:
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                found.append(Board(nvml.nvmlDeviceGetUUID(instance), f"{name} (MIG)", instance, mig=True))
            except nvml.NVMLError:  # numbers are not contiguous
                continue
        return tuple(found)

    def visible(self) -> tuple[Board, ...]:
        """The GPUs that CUDA shows this program, in CUDA's order."""
        if torch.cuda.is_available():
            uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
            return tuple(self.board(uuid) for uuid in uuids)
        if len({board.name for board in self.boards}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            self.notes.append(
                "the GPUs differ and torch sees none: their numbers are NVML's (CUDA_DEVICE_ORDER=PCI_BUS_ID)"
            )
        return tuple(visible_boards(os.environ.get("CUDA_VISIBLE_DEVICES"), self.boards))

    def board(self, uuid: str) -> Board:
        """The one with this UUID (with or without ``GPU-``); without a handle when NVML does not list it."""
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        everything = [b for board in self.boards for b in (*board.instances, board)]
        for board in everything:
            if board.uuid.removeprefix("GPU-").removeprefix("MIG-") == bare:
                return board.instances[0] if len(board.instances) == 1 else board
        self.notes.append(f"NVML does not list the GPU with UUID {uuid}: its counters are N/A")
        return Board(uuid, "N/A", None)


class Counters:
    """Reads every counter of one board. What it turns out not to have is not asked for again."""

    def __init__(self, nvml: Nvml, board: Board) -> None:
        lib, handle = nvml.library, board.handle
        self._lib, self._handle = lib, handle
        self._fields = dict(_FIELDS) if handle is not None else {}
        self._previous: dict[int, tuple[float, int]] = {}
        self.pcie_blocks = False  # known after the first read: only the slow call is left
        self.pcie: dict[str, float] = {}  # what read_pcie found last
        self._readers: dict[str, Callable[[], float]] = {}
        if handle is None:
            return
        self._readers = {
            "utilisation": lambda: lib.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_mib": lambda: lib.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
            "power_w": lambda: lib.nvmlDeviceGetPowerUsage(handle) / 1000,
            "sm_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_MEM),
            "temperature_c": lambda: lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU),
            "throttle": self._throttle,
        }

    def read(self, now: float) -> Mapping[str, float]:
        """Every quantity at ``now`` (seconds, for the rates).

        Raises:
            GpuLost: the GPU is gone.
        """
        found = dict(self.pcie)
        self._read_fields(found, now)
        for name in [name for name in self._readers if name not in found]:
            value = self._try(self._readers[name])
            if value is None:
                del self._readers[name]
            else:
                found[name] = value
        return found

    def read_pcie(self) -> None:
        """The call that blocks: 20 ms in each direction."""
        found = {}
        for name, way in {"pcie_tx_mib_s": 0, "pcie_rx_mib_s": 1}.items():  # NVML_PCIE_UTIL_TX_BYTES and RX, in KB/s
            value = self._try(partial(self._lib.nvmlDeviceGetPcieThroughput, self._handle, way))
            if value is None:
                self.pcie_blocks = False
            else:
                found[name] = value * 1000 / 2**20
        self.pcie = found

    def _throttle(self) -> int:
        try:
            bits = self._lib.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except self._lib.NVMLError_FunctionNotFound:  # drivers before 535 have it under its old name
            bits = self._lib.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        return int(bits)

    def _try(self, read: Callable[[], float]) -> float | None:
        """The value, NaN for one that failed this time, None for one that always will."""
        try:
            return float(read())
        except self._lib.NVMLError as error:
            if error.value == _LOST:
                raise GpuLost(str(error)) from error
            return None if error.value in _ABSENT else math.nan

    def _read_fields(self, found: dict[str, float], now: float) -> None:
        if not self._fields:
            return
        try:
            values = self._lib.nvmlDeviceGetFieldValues(self._handle, list(self._fields.items()))
        except self._lib.NVMLError as error:
            if error.value == _LOST:
                raise GpuLost(str(error)) from error
            if error.value in _ABSENT:
                self._fields = {}
                self.pcie_blocks = True
            return
        for value in values:
            number = value.fieldId
            if value.nvmlReturn == _LOST:
                raise GpuLost("GPU is lost")
            if value.nvmlReturn in _ABSENT:
                del self._fields[number]
                self.pcie_blocks |= number == _PCIE_TX
            elif value.nvmlReturn == 0:
                kind = _VALUE_TYPES[value.valueType]
                when = value.timestamp / 1e6 or now  # the driver's own clock, where it tells
                self._note(found, number, getattr(value.value, kind), 32 if kind == "uiVal" else 64, when)

    def _note(self, found: dict[str, float], number: int, value: float, bits: int, when: float) -> None:
        if number == _POWER:
            found["power_w"] = value / 1000
            return
        name, unit = _RATES[number]
        before, self._previous[number] = self._previous.get(number), (when, int(value))
        if before is not None and when > before[0]:
            grown = (int(value) - before[1]) % 2**bits  # the short ones wrap
            found[name] = grown * unit / (when - before[0]) if grown < 2**62 else math.nan  # reset meanwhile
