"""Reports on runs: comparisons, costs and pictures.

May import everything else in ``trainer``; nothing else there may import it.
"""
