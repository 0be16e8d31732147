"""The kernels of layers, and how each is lowered on each backend."""
