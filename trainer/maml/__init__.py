"""The method: the inner loop, the objective of the outer loop, and the computation of its gradient.

Knows networks only as modules with a ``forward(x, norm)``, and knows neither settings nor files.
"""
