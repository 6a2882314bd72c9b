"""The trace: transformers' own code, run on fake tensors and seen allocation by allocation; and the caching allocator, simulated."""
