"""Expert parallelism as transformers trains it: what a rank holds."""

from __future__ import annotations

from ..errors import RecipeError


def refuse_ranks(name: str, experts: int, ranks: int) -> None:
    """Check that ranks divide a model's experts. Raises RecipeError with the numbers of ranks that do."""
    if experts % ranks:
        *others, last = (f"{n:,}" for n in range(2, experts + 1) if experts % n == 0)
        raise RecipeError(
            f"--expert-parallel {ranks:,}: {name} has {experts:,} experts, which {ranks:,} GPUs cannot share out evenly.\n"
            f"Use {', '.join(others)}{' or ' if others else ''}{last}."
        )
