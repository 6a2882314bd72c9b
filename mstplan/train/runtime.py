"""What the runtime asks of the device, of the host and of chance, in one object that is handed to whatever asks.

Training takes `RUNTIME`. A step of which only the memory is wanted hands in a subclass that answers otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Runtime:
    """As training has it. Holds nothing, so one serves all models."""

    def adds_to_fp32(self, device_type: str) -> bool:
        """Has this kind of device a product of 16-bit matrices that adds to an fp32 one? CPUs take fp32 copies instead."""
        return device_type != "cpu"

    def add_product(self, total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """total (m, n) + a (m, k) b (k, n), in place, in fp32 (fp64 for fp64); no total: the product alone."""
        if a.dtype in (torch.float32, torch.float64):
            return a @ b if total is None else total.addmm_(a, b)
        if not self.adds_to_fp32(a.device.type):
            return self.add_product(total, a.float(), b.float())
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    def empty_on_host(self, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        """Room on the host for a tensor like `like`. Raises RuntimeError when there is none."""
        try:
            return torch.empty_like(like, device="cpu", pin_memory=pinned)
        except RuntimeError as e:
            if not pinned:
                raise
            # CUDA's words for it are those for a full card
            raise RuntimeError(
                f"no pinned CPU RAM for {like.numel() * like.itemsize} bytes more of layer inputs"
            ) from e

    def draw_seed(self) -> int | None:
        """For the random numbers of one MLP's chunks; None: they need not be the same in both passes."""
        return int(torch.randint(1 << 62, ()))

    def chunk_slices(self, tokens: int, rows: int) -> Iterator[tuple[int, slice]]:
        """(number, place) of each chunk of at most `rows` of `tokens` tokens."""
        for n, start in enumerate(range(0, tokens, rows)):
            yield n, slice(start, min(start + rows, tokens))


RUNTIME = Runtime()
