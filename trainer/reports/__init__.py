"""Reports on runs: comparisons, costs, pictures, and models with their cards.

May import everything else in ``trainer``; nothing else there may import it.
"""
