"""The runtime: transformers' own models, trained with the MLP and the LM head in chunks. Imports torch."""

try:
    import torch as torch
    import transformers as transformers
except ImportError as missing:
    raise ImportError(f"minisequence needs torch and transformers ({missing}): pip install 'mstplan[torch]'") from None

from .wrap import minisequence

__all__ = ["minisequence"]
