"""The folder, checkpoints and metrics of runs, and the recipes that reproduce published ones.

Reads and writes files, and trains nothing. Of the top-level modules it may import only ``settings``.
"""
