"""Hash a dataset's raw files and banks again. All problems are returned, not raised."""

from __future__ import annotations

from pathlib import Path

from mamldata.bank.folder_digest import folder_sha256
from mamldata.bank.format import check_bank, read_description
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DataMissingError
from mamldata.fetching.receipts import dataset_command, fetch_command
from mamldata.fetching.verify import check_raw
from mamldata.progress import Progress, silent


def verify_dataset(manifest: Manifest, root: Path, progress: Progress = silent) -> list[str]:
    """Hash a dataset's raw files and all its banks again.

    Returns:
        One line for each problem: the file, what was expected and found, the remedy. Empty if all is well.

    Raises:
        DataMissingError: nothing of the dataset is under the root.
    """
    folder = manifest.home(root)
    if manifest.folder is not None:
        return _verify_folder(manifest, folder, progress)
    banks = sorted(folder.path.glob(f"{manifest.name}-*.json"))
    arrays = sorted(folder.path.glob(f"{manifest.name}-*.npy"))
    if not banks and not folder.raw.is_dir():
        raise DataMissingError(f"There is nothing of {manifest.name} in {root}. Run: {fetch_command(manifest, root)}")
    problems = check_raw(manifest, root, progress)
    for description in banks:
        problems += check_bank(description, progress)
    for path in arrays:
        if path.with_suffix(".json") not in banks:
            problems.append(f"{path} has no description {path.stem}.json. Delete it: the next build makes it again.")
    return problems


def _verify_folder(manifest: Manifest, folder: DatasetFolder, progress: Progress) -> list[str]:
    """Compare a user's own folder with the sources recorded in its banks."""
    assert manifest.folder is not None
    banks = sorted(folder.path.glob(f"{folder.name}-*.json"))
    if not banks:
        raise DataMissingError(
            f"There is no bank of {manifest.folder} yet. "
            f"Run: {dataset_command('build', manifest, folder.root)} --out ARCHIVE"
        )
    digest = folder_sha256(manifest.folder, None, progress)
    problems = []
    for description in banks:
        found = check_bank(description, progress)
        if not found and read_description(description)["sources"][0]["sha256"] != digest:
            array = description.with_suffix(".npy").name
            change = "an image in it was changed, added or removed. The next build makes the bank again."
            found = [f"{manifest.folder} is not what {array} was made of: {change}"]
        problems += found
    return problems
