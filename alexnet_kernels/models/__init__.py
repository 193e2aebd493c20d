"""AlexNet in every published form: on one device, and on two as its authors ran it."""

from .alexnet import AlexNet, alexnet
from .graphed import Graphed, GraphedStep, graphed, graphed_step
from .two_device import TwoDeviceAlexNet, merge_state, split_state

__all__ = [
    "AlexNet",
    "Graphed",
    "GraphedStep",
    "TwoDeviceAlexNet",
    "alexnet",
    "graphed",
    "graphed_step",
    "merge_state",
    "split_state",
]
