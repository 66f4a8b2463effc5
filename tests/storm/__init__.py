"""A standing storm: kills, damage, bad servers and full disks, by the thousand. See ``docs/reliability.md``."""
