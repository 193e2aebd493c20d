"""Measuring: a fair timer (``timer``), what the devices did meanwhile (``nvml``)."""
