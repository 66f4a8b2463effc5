"""Meta-batches in torch, on a device. The only room of mamldata that imports torch."""
