"""Language models with product-key memory, in JAX and Flax."""

__version__ = '0.1.0'
