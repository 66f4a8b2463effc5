"""Readers find the images of a dataset in its raw files, and the class of each. They decode nothing."""
