"""The runtime: transformers' own models, trained with the MLP and the LM head in chunks. Imports torch."""

from .wrap import minisequence

__all__ = ["minisequence"]
