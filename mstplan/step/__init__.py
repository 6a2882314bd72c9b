"""One training step in bytes: the recipe by which it runs, its operations on a tape, what lives when. No torch."""
