"""Raw files: fetched from any source, verified, and kept with a receipt. Nothing here decodes an image."""
