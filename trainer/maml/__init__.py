"""The method: what adapts to an episode, what the outer loop follows, and how its gradient is computed.

Knows networks only as modules with a ``forward(x, norm)``, and neither settings nor files.
"""
