"""Where a stream's episodes come from: an archive in a folder or at an address, remixed, or live. No torch here."""
