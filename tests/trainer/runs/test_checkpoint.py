from __future__ import annotations

import pickle
import random
import tracemalloc
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from synthetic import Synthetic

from mamldata.errors import DamagedError, MamldataError, RequestError
from trainer.networks.networks import build_network
from trainer.runs import checkpoint as module
from trainer.runs.checkpoint import Checkpoint, find_best, find_last, load_checkpoint, save_checkpoint


def checkpoint(step: int = 10, accuracy: float = 0.5, best_step: int | None = None) -> Checkpoint:
    network = build_network("conv4", 1, 12, 5, seed=step)
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return Checkpoint(
        step=step,
        accuracy=accuracy,
        best_step=step if best_step is None else best_step,
        best_accuracy=accuracy,
        settings={"algorithm": "maml", "network": "conv4", "seed": 0, "eval_inner_steps": None},
        data=Synthetic().describe(),
        weights=network.state_dict(),
        optimizer=optimizer.state_dict(),
        stream={"next_batch": step, "name": "x", "shape": [1, 2], "none": None},
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    """All that was saved comes back equal, to the bit and in its memory layout."""
    saved = checkpoint()
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    for field in fields(Checkpoint):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        if field.name == "weights":
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(before[name].stride() == after[name].stride() for name in before)
        elif field.name == "optimizer":
            assert before["param_groups"] == after["param_groups"]
            for i, state in before["state"].items():
                assert all(torch.equal(state[key], after["state"][i][key]) for key in state)
        else:
            assert before == after
    network, learned = loaded.restored(tmp_path)
    assert learned.rates == learned.norms == {}
    assert all(torch.equal(saved.weights[name], value) for name, value in network.state_dict().items())


def test_name_says_algorithm_step_and_accuracy(tmp_path: Path) -> None:
    """The file is called after what is in it."""
    path = save_checkpoint(tmp_path, checkpoint(step=1200, accuracy=0.98765))
    assert path.name == "maml_step1200_acc0.9877.pt"


def test_one_without_a_validation(tmp_path: Path) -> None:
    """It is called after its step, and is kept beside the best one until the next one comes, at the same step, too."""
    save_checkpoint(tmp_path, checkpoint(step=10, accuracy=0.5))
    window = {"losses": torch.ones(2), "accuracies": torch.ones(2, 1)}
    between = replace(checkpoint(step=12, best_step=10), accuracy=None, window=window)
    loaded = load_checkpoint(save_checkpoint(tmp_path, between))
    assert loaded.accuracy is None
    assert torch.equal(loaded.window["losses"], torch.ones(2))
    assert names(tmp_path) == {"maml_step10_acc0.5000.pt", "maml_step12.pt"}
    assert find_last(tmp_path) == tmp_path / "maml_step12.pt"
    assert find_best(tmp_path) == tmp_path / "maml_step10_acc0.5000.pt"
    save_checkpoint(tmp_path, checkpoint(step=12, accuracy=0.75))
    assert names(tmp_path) == {"maml_step12_acc0.7500.pt"}


def test_one_of_before_windows_were_saved(tmp_path: Path) -> None:
    """A checkpoint without a window is read as one right after a line of the metrics."""
    path = save_checkpoint(tmp_path, checkpoint())
    content = torch.load(path, weights_only=True)
    del content["window"]
    torch.save(content, path)
    assert load_checkpoint(path).window == {}


def test_same_state_gives_same_bytes(tmp_path: Path) -> None:
    """A checkpoint holds nothing but the run's state: no time, no path."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (save_checkpoint(tmp_path / name, checkpoint()) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    """Older checkpoints and unfinished ones go; other files stay, whatever they are called."""
    (tmp_path / "maml_step3_acc0.1000.pt.part").write_bytes(b"left by a killed process")
    (tmp_path / "my_step3_notes.pt").write_bytes(b"mine")
    for step, accuracy, best in [(5, 0.3, 5), (10, 0.6, 10), (15, 0.4, 10), (20, 0.5, 10)]:
        save_checkpoint(tmp_path, checkpoint(step, accuracy, best))
    assert names(tmp_path) == {"maml_step10_acc0.6000.pt", "maml_step20_acc0.5000.pt", "my_step3_notes.pt"}
    assert find_last(tmp_path) == tmp_path / "maml_step20_acc0.5000.pt"
    assert find_best(tmp_path) == tmp_path / "maml_step10_acc0.6000.pt"


def test_last_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """Steps are compared as numbers, not as text."""
    for step in (9, 10):
        (tmp_path / f"maml++_step{step}_acc0.5000.pt").touch()
    assert find_last(tmp_path) == tmp_path / "maml++_step10_acc0.5000.pt"


def test_no_checkpoint(tmp_path: Path) -> None:
    """An empty folder has no last one, and asking it for the best one is an error that says what to give."""
    assert find_last(tmp_path) is None
    assert find_last(tmp_path / "absent") is None
    with pytest.raises(RequestError, match=r"holds no checkpoint. Give a run folder or a checkpoint file."):
        find_best(tmp_path)
    with pytest.raises(RequestError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


def test_missing_best_is_named(tmp_path: Path) -> None:
    """If someone removed the best checkpoint, the error says which one is there."""
    save_checkpoint(tmp_path, checkpoint(20, 0.5, best_step=10))
    with pytest.raises(RequestError, match=r"no checkpoint of its best step, 10. Evaluate .*step20_acc0.5000.pt"):
        find_best(tmp_path)


def test_a_failed_write_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename: the new checkpoint does not exist, the older ones do and can be read."""
    save_checkpoint(tmp_path, checkpoint(5))

    def killed(path: Path, data: bytes) -> None:
        path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, checkpoint(10))
    last = find_last(tmp_path)
    assert last is not None
    assert load_checkpoint(last).step == 5


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """Pickles, torch files of others and plain rubbish are refused with their name, and no code of theirs is run."""
    made = tmp_path / "made"
    contents = {
        "plain.pt": lambda path: path.write_bytes(pickle.dumps(Evil(made))),
        "evil.pt": lambda path: torch.save({"format": "mamldata-checkpoint/1", "x": Evil(made)}, path),
        "other.pt": lambda path: torch.save({"state_dict": {}}, path),
        "list.pt": lambda path: torch.save([1, 2], path),
        "hollow.pt": lambda path: torch.save({"format": "mamldata-checkpoint/1"}, path),
        "bare.pt": lambda path: torch.save({"format": "mamldata-checkpoint/1", **vars(checkpoint()), "data": 3}, path),
        "text.pt": lambda path: path.write_text("hello"),
        "empty.pt": lambda path: path.touch(),
    }
    for name, write in contents.items():
        write(tmp_path / name)
        with pytest.raises(RequestError, match=f"{name} is not a checkpoint of this trainer"):
            load_checkpoint(tmp_path / name)
    assert not made.exists()


def test_a_plain_zip_is_refused(tmp_path: Path) -> None:
    """A zip of something else is not taken for a checkpoint."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("a.txt", "hello")
    with pytest.raises(RequestError, match="is not a checkpoint of this trainer"):
        load_checkpoint(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(method: int, tmp_path: Path) -> None:
    """torch.save stores them; what is compressed might take any amount of memory, and nothing of it is unpacked."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", method) as container:
        container.writestr("archive/data.pkl", bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(
            RequestError, match=r"not a checkpoint of this trainer: .* 'archive/data\.pkl' is compressed"
        ):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_pickle_that_is_longer_than_its_tensors_need(tmp_path: Path) -> None:
    """A list of one byte takes 64 of memory: megabytes of them are refused by their length."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("archive/data.pkl", b"\x80\x02" + b"]" * (5 << 20) + b".")
    with pytest.raises(RequestError, match=r"'archive/data\.pkl' has 5,242,883 bytes, more than 4,194,304"):
        load_checkpoint(path)


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """A directory may name the same bytes many times, each of which would be a tensor of its own in memory."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("archive/data/0", bytes(1 << 20))
        container.filelist += container.filelist * 9
    with pytest.raises(MamldataError, match=r"its members are longer than the file|[Oo]verlap"):
        load_checkpoint(path)


def test_damage_is_found(tmp_path: Path) -> None:
    """A cut-off file and a flipped bit in the weights are errors that name the file and the remedy."""
    path = save_checkpoint(tmp_path, checkpoint())
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(
            DamagedError, match=r"step10_acc0.5000.pt: a damaged container .* Remove it: the run then resumes"
        ):
            load_checkpoint(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DamagedError, match=r"is wrong\). Remove it"):
        load_checkpoint(path)


def test_no_flipped_byte_changes_what_is_loaded(tmp_path: Path) -> None:
    """Wherever a byte is flipped: a clear error, or a place where it means nothing."""
    saved = checkpoint()
    path = save_checkpoint(tmp_path, saved)
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[chance.choice([chance.randrange(len(whole)), len(whole) - 1 - chance.randrange(3000)])] ^= 0x41
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except MamldataError:
            continue
        assert replace(loaded, weights={}, optimizer={}) == replace(saved, weights={}, optimizer={})
        assert all(torch.equal(saved.weights[name], loaded.weights[name]) for name in saved.weights)
