"""What is reported of runs: comparisons, costs and pictures.

May import all other rooms; nothing else in ``trainer`` may import it.
"""
