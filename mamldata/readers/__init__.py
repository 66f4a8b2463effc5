"""Where the images of a dataset are in its raw files, and which class each shows. A reader decodes nothing."""
