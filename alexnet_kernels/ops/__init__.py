"""The operations as PyTorch sees them: schema, shape function, gradient, vmap, autocast. One file an op family."""

from . import composite, lrn

__all__ = ["composite", "lrn"]
