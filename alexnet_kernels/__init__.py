"""AlexNet as its 2012 authors ran it, on two devices: the network as data, its operations as fast drop-in replacements.

``functional`` and ``nn`` have ``torch.nn``'s signatures; ``models`` has every published variant on one device and on two;
``use_backend`` and ``explain`` tell what runs. Importing this package loads neither Triton nor torchvision.
"""

from . import functional, geometry, models, nn, optim, reference
from ._version import __version__
from .convert import conversion_report, convert, revert
from .dispatch import use_backend
from .functional import explain

__all__ = [
    "__version__",
    "conversion_report",
    "convert",
    "explain",
    "functional",
    "geometry",
    "models",
    "nn",
    "optim",
    "reference",
    "revert",
    "use_backend",
]
