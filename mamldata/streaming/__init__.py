"""Meta-batches in torch, on a device. The only package of mamldata that imports torch."""
