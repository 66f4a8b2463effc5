"""Data about the datasets of mamldata: a TOML file each, with class lists as plain text. No code lives here."""
