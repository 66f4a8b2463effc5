"""What a run leaves: its folder, checkpoints and metrics; and the recipes that repeat published runs.

Reads and writes files, and trains nothing. Of the modules beside the rooms it may import ``settings`` alone.
"""
