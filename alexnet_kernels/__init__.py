"""AlexNet as its 2012 authors ran it, on two devices: the network as data, its operations as fast drop-in replacements.

``functional`` and ``nn`` have ``torch.nn``'s signatures; ``models`` has every published variant on one device and on two;
``use_backend`` and ``explain`` tell what runs. Importing this package loads neither Triton nor torchvision.
"""

from . import functional, geometry, models, nn, reference
from ._version import __version__
from .dispatch import use_backend

__all__ = ["__version__", "functional", "geometry", "models", "nn", "reference", "use_backend"]
