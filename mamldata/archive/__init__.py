"""Episodes on disk and at addresses: planned, written, read and verified. Nothing here decodes an image."""
