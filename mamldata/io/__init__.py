"""Files and bytes: atomic writes, containers, digests, npy, pickles, images, addresses, TOML. It knows no dataset."""
