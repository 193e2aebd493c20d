"""The operations as PyTorch sees them: schema, shape function, gradient, vmap, autocast. One file an op family."""

from . import composite, conv, conv_chain, fused, linear, lrn, optim, pool, stem

__all__ = ["composite", "conv", "conv_chain", "fused", "linear", "lrn", "optim", "pool", "stem"]
