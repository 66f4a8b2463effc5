"""Hash all raw files again and compare them with their manifest and their receipts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mamldata.datasets.manifest import COLLECTED, Manifest, SourceFile
from mamldata.datasets.paths import DatasetFolder
from mamldata.errors import DamagedError
from mamldata.fetching.collect import check_collected
from mamldata.fetching.receipts import fetch_command, is_pinned, is_verified, pin_file, read_receipt, verify_file
from mamldata.io.atomic import MOST_NOTE, read_whole
from mamldata.io.digest import canonical_json, sha256_file
from mamldata.progress import Progress, silent


def check_raw(manifest: Manifest, root: Path, progress: Progress = silent) -> list[str]:
    """Hash all raw files again and compare them with the manifest and with their receipts.

    The receipt guards what a content digest does not cover: the bytes of a repacked container between its members.

    Args:
        manifest: the dataset.
        root: the data root.
        progress: one bar of hashed bytes per file.

    Returns:
        One line for each file that is missing or has changed, with the remedy. Empty if all is well.
    """
    folder = manifest.home(root)
    command = fetch_command(manifest, root)
    problems = [_check_file(folder, file, command, progress) for file in manifest.files]
    if manifest.images is not None:
        problems.append(_check_collected(manifest, folder, command, progress))
    return [problem for problem in problems if problem]


def _check_collected(manifest: Manifest, folder: DatasetFolder, command: str, progress: Progress) -> str:
    """Check the tar of collected images against its receipt, and the pin against the images in the tar."""
    path, receipt, noted = folder.raw / COLLECTED, folder.receipt(COLLECTED), read_receipt(folder, COLLECTED)
    pin = pin_file(folder.raw)
    if not path.is_file():
        return f"{path} is missing. Run: {command} --from FOLDER"
    if noted is None:
        state = "is damaged" if receipt.exists() else "is missing"
        return f"{receipt} {state}, and it alone has the digest of {path.name}. Run: {command}"
    try:
        with progress(path.name, path.stat().st_size, "B") as advance:
            digest = sha256_file(path, advance)
        if digest != noted.sha256:
            return (
                f"{path} is damaged: sha256 {digest}, expected {noted.sha256}. Delete it and {receipt.name} beside "
                f"it, and run: {command} --from FOLDER"
            )
        held = check_collected(manifest, folder.raw, path, progress)
        pinned = read_whole(pin, MOST_NOTE) if pin.is_file() else None
    except DamagedError as error:
        return f"{path} does not have all images of {manifest.name}. {error}"
    except OSError as error:
        return _unreadable(path, error)
    if pinned is None:
        return f"{pin} is missing; {path.name} beside it matches its receipt. Run: {command}"
    if pinned != canonical_json(asdict(held)):
        return (
            f"{pin} is damaged: it does not match {path.name} beside it, which has {held.images:,} images with the "
            f"content digest {held.content_sha256}. Delete it, and run: {command}"
        )
    assert manifest.images is not None
    return "" if is_pinned(folder, manifest.images) else _outdated(receipt, path, digest, command)


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}). Fix its permissions or its disk, or fetch it to another root."


def _outdated(receipt: Path, path: Path, digest: str, command: str) -> str:
    return (
        f"{receipt} was altered, or is for another manifest; {path.name} beside it is correct (sha256 {digest}). "
        f"Run: {command}"
    )


def _check_file(folder: DatasetFolder, file: SourceFile, command: str, progress: Progress) -> str:
    path, receipt = folder.raw / file.name, folder.receipt(file.name)
    if not path.is_file():
        return f"{path} is missing. Run: {command}"
    try:
        with progress(file.name, path.stat().st_size, "B") as advance:
            verdict = verify_file(path, file, advance)
    except OSError as error:
        return _unreadable(path, error)
    noted = read_receipt(folder, file.name)
    again = f"Delete {path} and {receipt.name} beside it, and run: {command}"
    if verdict.checked_by is None:
        return f"{path} is damaged: {verdict.problem}. {again}"
    if noted is None:
        state = "is damaged" if receipt.exists() else "is missing"
        return (
            f"{receipt} {state}; {path.name} beside it is correct (sha256 {verdict.sha256}). "
            f"Delete the receipt if it exists, and run: {command}"
        )
    if noted.sha256 == verdict.sha256:
        return "" if is_verified(folder, file) else _outdated(receipt, path, verdict.sha256, command)
    return (
        f"{path} has sha256 {verdict.sha256}, but its receipt {receipt.name} says {noted.sha256}: one of them was "
        f"altered. {again}"
    )
