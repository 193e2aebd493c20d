"""Measuring: a fair timer (``timer``), what the devices did meanwhile (``monitor``), for any command too (``process``)."""

from .monitor import GpuMonitor, Usage

__all__ = ["GpuMonitor", "Usage"]
