"""Which classes and images make up an episode, and in which order: pure functions of numbers, without files."""
