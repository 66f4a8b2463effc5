"""Bytes on this machine: atomic files, containers, digests, npy, pickles, addresses, TOML. It knows no datasets."""
