"""Episodes on disk and at addresses: planned, written, read and verified. It knows no torch."""
