"""From the name of a dataset to its archive in two calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import mamldata

FIRST = Path(__file__).parents[1] / "fixtures" / "first"


def test_fetch_and_build_give_the_archive_of_the_command_line(tmp_path: Path) -> None:
    """The public functions take names and paths as strings, and give the digest that the commands gave."""
    shutil.copy(FIRST / "tiny.toml", tmp_path)
    dataset, root, out = str(tmp_path / "tiny.toml"), str(tmp_path / "root"), str(tmp_path / "out")
    [raw] = mamldata.fetch(dataset, root=root, sources=[str(FIRST / "root" / "tiny" / "raw")], offline=True)
    assert raw.how == "copied"
    episodes = {"train": 12, "val": 4, "test": 6}
    built = mamldata.build(
        dataset, out, n_way=3, k_query=2, episodes=episodes, episodes_per_shard=8, root=root, workers=1
    )
    assert built.digest == "3bdd0f6bca59eab954c1774e780c5335305d8e339e1e23585a6a7fb4ddd3f1f3"
    for place in (out, Path(out), Path(out).as_uri()):
        assert mamldata.read_archive(place).digest == built.digest


def test_what_is_not_there_is_an_error() -> None:
    """Of an unknown name the message lists the known ones."""
    with pytest.raises(mamldata.MamldataError, match="Did you mean 'omniglot'"):
        mamldata.fetch("omniglott")
