"""Data about datasets: one TOML file each, with class lists as plain text beside it. No code lives here."""
