"""Raw files: fetched from wherever they are, verified, and kept with a receipt. Nothing here decodes an image."""
