"""All images of a dataset at one size, decoded once and memory-mapped. It knows nothing of episodes."""
