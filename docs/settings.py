"""Write the table of settings in training.md from their declaration: python docs/settings.py."""

from __future__ import annotations

from pathlib import Path

from trainer.settings import SETTINGS, Setting

PAGE = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- written by docs/settings.py -->\n\n", "\n<!-- end -->\n"


def _values(setting: Setting) -> str:
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.shown_choices)
    words = {"int": "whole number", "float": "number", "bool": "yes, no"}[setting.kind]
    bounds = {"at least": setting.at_least, "at most": setting.at_most}
    words += "".join(f", {side} {bound}" for side, bound in bounds.items() if bound is not None)
    return f"positive {words}" if setting.positive else words


def rewritten(page: str) -> str:
    """The page with today's table."""
    head, _, rest = page.partition(BEGIN)
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        option = f"`--{name.replace('_', '-')}`"
        rows.append(f"| {option} | {_values(setting)} | {setting.default_in_words} | {setting.meaning} |")
    return head + BEGIN + "\n".join(rows) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
