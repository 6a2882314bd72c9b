"""MsT's loss: transformers' own, over pieces of the sequence, with its gradients made as soon as a piece's logits exist."""

from __future__ import annotations

from .transformers import Transformers


class Chunked(Transformers):
    name = "chunked"
    in_chunks = True
