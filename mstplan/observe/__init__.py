"""Watching a training step: on fake tensors, on the CPU, on CUDA.

Two kinds of modules: those that run a step import torch (step, tracer, recorder, marking, allocations, sharding, cuda, cpu, point, ranks);
those that work with what was seen do without, and say so.
"""
