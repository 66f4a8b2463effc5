"""What is told of runs: comparisons, costs and pictures.

Stands on everything else; nothing else in ``trainer`` may import it.
"""
