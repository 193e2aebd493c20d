"""AlexNet in every published form: on one device, and on two as its authors ran it."""

from .alexnet import AlexNet, alexnet
from .two_device import TwoDeviceAlexNet, merge_state, split_state

__all__ = ["AlexNet", "TwoDeviceAlexNet", "alexnet", "merge_state", "split_state"]
