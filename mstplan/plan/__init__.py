"""Answers: the longest sequence, what fits, what would make it fit, and what an answer stands on. No torch."""
