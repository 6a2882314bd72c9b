"""Watching a training step: on fake tensors, on the CPU, on CUDA. Imports torch."""
