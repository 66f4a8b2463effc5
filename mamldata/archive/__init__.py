"""Episodes on disk and at addresses: planned, written, read and verified. Does not import torch."""
