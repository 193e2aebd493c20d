"""The operations as PyTorch sees them: schema, shape function, gradient, vmap, autocast. One file an op family."""

from . import composite, fused, lrn, pool, stem

__all__ = ["composite", "fused", "lrn", "pool", "stem"]
