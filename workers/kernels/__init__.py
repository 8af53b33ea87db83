"""Triton kernels for what a forward pass does between matrix products. Imported only where tensors are on a GPU."""
