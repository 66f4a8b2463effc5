"""The folder, checkpoints, model files and metrics of runs, how they adapt, and recipes of published ones.

Reads and writes files, and trains nothing. Of the top-level modules it may import only ``settings``.
"""
