"""Processes, signals, threads and memory.

Knows nothing of learning: any program on torch could use what is here.
"""
