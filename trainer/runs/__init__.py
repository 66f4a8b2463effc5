"""What a run leaves: its folder, checkpoints and metrics; and the recipes by which published runs are made again.

Reads and writes files, and trains nothing. Of the modules beside the rooms it may import ``settings`` alone.
"""
