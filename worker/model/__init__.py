"""Models: loading, layers, the KV cache's tensors, sampling. The only torch code of the worker."""
