"""What is trained: the networks, their batch norms, and the precision of their arithmetic.

Knows nothing of episodes, of how a network learns, or of files.
"""
