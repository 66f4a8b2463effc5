"""What a dataset is: its manifest, its folder under the data root. Nothing here fetches a file or decodes an image."""
