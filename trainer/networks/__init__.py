"""The networks, their normalization, and the precision of their arithmetic.

Knows nothing of episodes, of how a network learns, or of files.
"""
