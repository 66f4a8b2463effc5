"""The trainer's data: what its streams give, that a split is opened once, and what is said and stored of it."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mamldata
from mamldata.archive.build import build
from mamldata.archive.index import read_archive
from mamldata.archive.plan import BuildRequest
from mamldata.bank.format import Bank
from mamldata.datasets.manifest import Manifest
from mamldata.errors import DamagedError, RequestError
from mamldata.sampling.normalization import Normalization
from mamldata.sources.open import open_archive
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.stream import EpisodeStream
from trainer.data import EpisodeData, archive_data, live_data
from trainer.evaluation import Evaluation, evaluate
from trainer.loop import train
from trainer.runs.checkpoint import find_last, load_checkpoint, load_run
from trainer.runs.folder import CONFIG
from trainer.settings import TrainSettings

CPU = torch.device("cpu")
OPTIONS = {"n_way": 3, "k_shot": 1, "k_query": 2, "seed": 4}
REQUEST = BuildRequest(**OPTIONS, episodes={"train": 11, "val": 6, "test": 5}, episodes_per_shard=4)
QUICK = {"filters": 4, "meta_batch_size": 2, "eval_every": 1, "eval_episodes": 4, "device": "cpu"}


class Server(ThreadingHTTPServer):
    """Serves a folder until it is ``down``; ``asked`` counts the requests for each file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.down = False
        self.asked: Counter[str] = Counter()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""

    def do_GET(self) -> None:
        self.server.asked[self.path.partition("?")[0].strip("/")] += 1
        if self.server.down:
            self.send_error(403)  # which is not asked for again
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, glyphs_manifest: Manifest, glyphs_bank: Bank) -> Path:
    """A small archive of several shards; not to be written to."""
    out = tmp_path_factory.mktemp("data") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def server(archive: Path) -> Iterator[Server]:
    """Serves the archive."""
    running = Server(archive)
    yield running
    running.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.fixture(params=["archive", "live", "address"])
def data(request: pytest.FixtureRequest, archive: Path, glyphs_root: Path) -> EpisodeData:
    """The same episodes from a folder, drawn live, and from an address; not remixed."""
    if request.param == "live":
        return live_data("glyphs", glyphs_root, OPTIONS)
    place = archive if request.param == "archive" else request.getfixturevalue("server").url
    return archive_data(place, remix=False)


def kept(batches: Iterable[EpisodeBatch]) -> list[EpisodeBatch]:
    """Batches use their memory again."""
    return [EpisodeBatch(*(part.clone() for part in batch)) for batch in batches]


def indices(batches: Iterable[EpisodeBatch]) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def same(ones: Iterable[EpisodeBatch], others: Iterable[EpisodeBatch]) -> bool:
    return all(
        torch.equal(a, b) for one, other in zip(ones, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def joined(ones: Iterable[EpisodeBatch], others: Iterable[EpisodeBatch]) -> list[EpisodeBatch]:
    """Of two processes' parts the whole meta-batches."""
    return [EpisodeBatch(*map(torch.cat, zip(*pair, strict=True))) for pair in zip(ones, others, strict=True)]


def stored(archive: Path, split: str, member: str) -> np.ndarray:
    """A member of all episodes of a split, as plain tarfile and NumPy read it."""
    found = []
    for path in sorted(archive.glob(f"{split}-*.tar")):
        with tarfile.open(path) as shard:
            found += [
                np.load(BytesIO(shard.extractfile(info).read()))
                for info in shard
                if info.name.endswith(f".{member}.npy")
            ]
    return np.stack(found)


class TestEvaluation:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_the_first_episodes_once_and_in_order(self, data: EpisodeData, archive: Path, split: str) -> None:
        """Of whichever split, in [0, 1], the last meta-batch being smaller."""
        batches = kept(data.eval(split, 5, 2, CPU))
        assert indices(batches) == [[0, 1], [2, 3], [4]]
        query = torch.cat([batch.query_x for batch in batches])
        expected = torch.from_numpy(stored(archive, split, "query")[:5]).flatten(1, 2).movedim(-1, 2)
        torch.testing.assert_close(query, expected / 255)

    def test_normalised_by_the_train_split_or_as_told(self, data: EpisodeData, archive: Path) -> None:
        """``normalize=True`` takes the archive's own mean and deviation, and numbers take their place."""
        plain = kept(data.eval("val", 4, 2, CPU))
        own, other = read_archive(archive).normalization, Normalization((0.25,), (0.5,))
        for normalize, (mean, std) in ((True, own), (other, other)):
            batches = kept(data.eval("val", 4, 2, CPU, normalize=normalize))
            for one, expected in zip(batches, plain, strict=True):
                for part in ("support_x", "query_x"):
                    wanted = (getattr(expected, part) - mean[0]) / std[0]
                    torch.testing.assert_close(getattr(one, part), wanted, atol=2e-6, rtol=0)

    def test_processes_share_each_meta_batch(self, data: EpisodeData) -> None:
        """Two ranks have the episodes of one, each its own, and none of the last meta-batch if there is but one."""
        whole = kept(data.eval("val", 5, 2, CPU))
        parts = [kept(data.eval("val", 5, 2, CPU, rank=rank, world_size=2)) for rank in range(2)]
        assert [a + b for a, b in zip(*map(indices, parts), strict=True)] == indices(whole)
        assert same(whole, joined(*parts))

    def test_no_more_than_there_are(self, archive: Path, glyphs_root: Path) -> None:
        """An archive has so many episodes, live ones never end, and a number below one is none."""
        data, live = archive_data(archive), live_data("glyphs", glyphs_root, OPTIONS)
        assert (data.available("val"), live.available("val")) == (6, None)
        with pytest.raises(RequestError, match="archive has 6 val episodes, but 7 were requested"):
            data.eval("val", 7, 2, CPU)
        assert indices(islice(live.eval("val", 1000, 7, CPU), 1)) == [[0, 1, 2, 3, 4, 5, 6]]
        for one in (data, live):
            with pytest.raises(RequestError, match="episodes must be at least 1, not 0"):
                one.eval("val", 0, 2, CPU)

    def test_a_split_that_is_not_there(self, archive: Path) -> None:
        """The archive's own message, also when another split is open."""
        data = archive_data(archive)
        data.available("val")
        with pytest.raises(RequestError, match="no split 'other'; the splits are train, val, test"):
            data.available("other")


class TestTraining:
    @pytest.mark.parametrize("remix", [False, True])
    def test_the_order_is_that_of_the_seed(self, archive: Path, remix: bool) -> None:
        """Epoch after epoch the meta-batches of the stream with that seed, and other ones for another seed."""
        data = archive_data(archive, remix=remix)
        drawn = {}
        for seed in (0, 1):
            stream = data.train(2, seed, CPU)
            drawn[seed] = [kept(stream) for _ in range(2)]
            expected = EpisodeStream(archive, "train", 2, seed, shuffle=None if remix else True, remix=remix)
            assert all(same(epoch, kept(expected)) for epoch in drawn[seed])
        assert not same(drawn[0][0], drawn[1][0])
        assert not same(drawn[0][0], drawn[0][1])

    def test_live_episodes_come_without_an_end(self, glyphs_root: Path) -> None:
        """One after the other, whatever the seed of the order."""
        data = live_data("glyphs", glyphs_root, OPTIONS)
        assert indices(islice(data.train(4, 1, CPU), 5)) == [list(range(t, t + 4)) for t in range(0, 20, 4)]

    def test_normalised(self, data: EpisodeData) -> None:
        """By the mean and deviation that the description says."""
        plain, other = (kept(islice(data.train(2, 0, CPU, normalize=on), 3)) for on in (False, True))
        (mean,), (std,) = data.describe()["normalisation"].values()
        for one, expected in zip(other, plain, strict=True):
            torch.testing.assert_close(one.support_x, (expected.support_x - mean) / std, atol=2e-6, rtol=0)

    def test_processes_share_each_meta_batch(self, data: EpisodeData) -> None:
        """Two ranks have the meta-batches of one."""
        whole = kept(islice(data.train(3, 1, CPU), 3))
        parts = [kept(islice(data.train(3, 1, CPU, rank=rank, world_size=2), 3)) for rank in range(2)]
        assert same(whole, joined(*parts))

    def test_classes_are_those_stored(self, data: EpisodeData, archive: Path) -> None:
        """Of every episode, by label; and the count is that of the split's table."""
        truth = torch.from_numpy(stored(archive, "train", "source")[..., 0])
        for batch in islice(data.train(2, 0, CPU), 3):
            assert torch.equal(data.classes(batch.index), truth[batch.index])
        assert data.class_count() == len(read_archive(archive).split("train").classes) > truth.max()

    def test_classes_of_remixed_episodes(self, archive: Path) -> None:
        """Those of the ways that they consist of."""
        data = archive_data(archive)
        ways = EpisodeStream(archive, "train", 2, 3, remix=True).source.ways
        truth = torch.from_numpy(stored(archive, "train", "source")[..., 0]).flatten()
        for batch in data.train(2, 3, CPU):
            assert torch.equal(data.classes(batch.index), truth[torch.from_numpy(ways(batch.index.numpy()))])

    def test_classes_need_no_shard(self, server: Server) -> None:
        """They are told beside the thread that reads, and must not touch what it reads from."""
        data = archive_data(server.url, remix=False)
        data.train(2, 0, CPU)
        assert data.classes(torch.arange(11)).shape == (11, 3)
        assert not [name for name in server.asked if name.endswith(".tar")]


class TestOpening:
    """A split is opened once, and kept."""

    @pytest.mark.parametrize("cached", [False, True])
    def test_nothing_is_asked_for_twice(self, server: Server, archive: Path, tmp_path: Path, cached: bool) -> None:
        """Not by describing, by validations or by a second training."""
        data = archive_data(server.url, remix=False, cache_dir=tmp_path / "cache" if cached else None)
        for seed in range(2):
            data.describe()
            assert data.available("val") == 6
            assert len(kept(data.train(1, seed, CPU))) == 11
            assert len(kept(data.eval("val", 6, 4, CPU))) == 2
        shards = [path.name for path in archive.glob("*.tar") if not path.name.startswith("test")]
        assert server.asked == {"archive.json": 2, "archive.json.sha256": 2, **dict.fromkeys(shards, 1)}

    def test_what_was_read_once_stays(self, archive: Path, server: Server, glyphs_root: Path, tmp_path: Path) -> None:
        """A folder that is removed, a server that goes away, a bank: the next validation is as the last."""
        place, root = shutil.copytree(archive, tmp_path / "archive"), shutil.copytree(glyphs_root, tmp_path / "root")
        ends = {
            archive_data(place): partial(shutil.rmtree, place),
            archive_data(server.url): partial(setattr, server, "down", True),
            live_data("glyphs", root, OPTIONS): partial(shutil.rmtree, root),
        }
        for data, end in ends.items():
            before = kept(data.eval("val", 6, 4, CPU))
            end()
            assert same(before, kept(data.eval("val", 6, 4, CPU)))

    @pytest.mark.slow
    def test_a_server_that_goes_away_ends_no_run(self, server: Server, tmp_path: Path) -> None:
        """What is here is enough: the run ends as it would have."""

        def go(name: str, notify: Callable[[str], object]) -> dict[str, torch.Tensor]:
            data = archive_data(server.url, remix=False)
            result = train(TrainSettings(steps=8, seed=1, **QUICK), data, tmp_path / name, notify=notify)
            return load_checkpoint(result.last).weights

        def leave(line: str) -> None:
            server.down |= line.startswith("step 6  val")  # all shards have come by then: 11 episodes in threes of 4

        ours, theirs = go("whole", lambda _: None), go("alone", leave)
        assert server.down
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    def test_too_few_val_episodes_are_refused_at_once(self, archive: Path, tmp_path: Path) -> None:
        """And not at the first validation."""
        settings = TrainSettings(**{**QUICK, "eval_episodes": 7, "eval_every": 1000})
        with pytest.raises(RequestError, match="has 6 val episodes, but 7 were requested"):
            train(settings, archive_data(archive), tmp_path / "run")
        assert not (tmp_path / "run" / CONFIG).exists()

    def test_an_archive_that_changes_is_noticed(self, tmp_path: Path, glyphs_manifest: Manifest, glyphs_bank: Bank):
        """A split that is opened later is of the same archive, or an error that says in what it differs."""
        place = tmp_path / "archive"
        build(glyphs_manifest, glyphs_bank, place, REQUEST)
        data = archive_data(place)
        data.available("val")
        shutil.rmtree(place)
        build(glyphs_manifest, glyphs_bank, place, BuildRequest(**{**OPTIONS, "seed": 5}, episodes={"train": 4}))
        with pytest.raises(
            DamagedError,
            match=r"changed while it was in use: its train split differs .* in episode_seed, archive_sha256, digest",
        ):
            data.train(2, 0, CPU)

    def test_images_that_change_change_no_run(self, tmp_path: Path) -> None:
        """A folder's splits are of one bank, or opening is an error; what is open stays as it is."""
        chance, folder = np.random.default_rng(0), tmp_path / "photos"

        def draw(split: str, label: int, number: int) -> None:
            path = folder / split / f"{split}{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)

        for split in ("train", "val", "test"):
            for label in range(3):
                for number in range(2):
                    draw(split, label, number)
        data = live_data(str(folder), tmp_path / "root", {"n_way": 3, "k_query": 1, "image_size": 8})
        about = data.describe()
        before = kept(data.eval("val", 3, 2, CPU))
        draw("val", 0, 0)
        assert same(before, kept(data.eval("val", 3, 2, CPU)))
        assert data.describe() == about
        with pytest.raises(
            DamagedError, match=r"photos changed .*: its test split differs from .* in bank_sha256, digest"
        ):
            data.eval("test", 3, 2, CPU)


class TestLifetime:
    """What a stream reads from stays as long as the stream, and no longer."""

    def test_a_stream_outlives_its_data(self, server: Server, archive: Path, temporary: Path) -> None:
        """Nobody else holds the data, and shards still come; with the stream goes the temporary folder."""
        batches = archive_data(server.url).eval("val", 6, 2, CPU)
        gc.collect()
        assert len(list(temporary.iterdir())) == 1
        assert same(kept(batches), kept(archive_data(archive).eval("val", 6, 2, CPU)))
        del batches
        gc.collect()
        assert not list(temporary.iterdir())

    def test_streams_at_the_same_time(self, server: Server, archive: Path, temporary: Path) -> None:
        """Training and evaluation of one split read side by side, from one temporary folder."""
        data, local = archive_data(server.url, remix=False), archive_data(archive, remix=False)
        training = iter(data.train(1, 0, CPU))
        index = next(training).index.item()
        expected = kept(local.eval("train", 11, 1, CPU))
        for one, two, truth in zip(
            data.eval("train", 11, 1, CPU), data.eval("train", 11, 1, CPU), expected, strict=True
        ):
            assert same([one, two], [truth, truth])
        assert sorted([index, *(batch.index.item() for batch in training)]) == list(range(11))
        assert len(list(temporary.iterdir())) == 1

    def test_streams_are_pickled(self, data: EpisodeData) -> None:
        """As a DataLoader sends them to its workers, which read the same."""
        stream = data.eval("val", 5, 2, CPU).stream
        assert same(kept(pickle.loads(pickle.dumps(stream))), kept(stream))


class TestDescription:
    def test_one_for_all_splits(self, data: EpisodeData, archive: Path) -> None:
        """What is opened first makes no difference, and all of it is JSON."""
        data.available("val")
        about = data.describe()
        data.available("train")
        assert data.describe() == about == json.loads(json.dumps(about))
        found = read_archive(archive)
        assert about["normalisation"] == {key: list(value) for key, value in found.normalization._asdict().items()}
        assert (about["dataset"], about["n_way"], about["image_shape"]) == ("glyphs", 3, [28, 28, 1])
        assert about["digest"] == (about["archive_sha256"] or found.bank_sha256)
        assert "split" not in about

    def test_how_images_were_prepared(self, archive: Path, glyphs_root: Path, tmp_path: Path) -> None:
        """Told by the bank of the same digest under the root, by a manifest that pins the digest, or not at all."""
        recipe = {"size": 28, "channels": 1, "resampling": "lanczos", "invert": True, "upright": False}
        data = live_data("glyphs", glyphs_root, OPTIONS)
        assert data.describe()["image"] == archive_data(archive, root=glyphs_root).describe()["image"] == recipe
        assert archive_data(archive, root=tmp_path).describe()["image"] == recipe  # pinned by the built-in manifest
        larger = tmp_path / "larger"
        shutil.copytree(glyphs_root / "glyphs" / "raw", tmp_path / "root" / "glyphs" / "raw")
        mamldata.build("glyphs", larger, root=tmp_path / "root", image_size=20, episodes={"train": 2}, workers=1)
        assert archive_data(larger, root=glyphs_root).describe()["image"] == "unknown"
        assert archive_data(larger, root=tmp_path / "root").describe()["image"] == {**recipe, "size": 20}

    def test_a_run_keeps_how_images_were_prepared(self, archive: Path, glyphs_root: Path, tmp_path: Path) -> None:
        """In config.json and in checkpoints, to prepare other images by; a resumed run may find it late."""
        run, stranger = tmp_path / "run", archive_data(archive)
        stranger._image = "unknown"
        train(TrainSettings(steps=1, **QUICK), stranger, run)
        assert json.loads((run / CONFIG).read_text())["data"]["image"] == "unknown"
        with pytest.raises(RequestError, match="does not record how its images of 28x28 pixels in 1 channel were prep"):
            load_run(run).image  # noqa: B018
        train(TrainSettings(steps=2, **QUICK), archive_data(archive, root=glyphs_root), run, resume=True)
        last = load_run(find_last(run) or run)
        assert last.image.to_json() == json.loads((run / CONFIG).read_text())["data"]["image"]
        old = load_run(run)
        del old.data["image"]  # as in the first version's checkpoints
        with pytest.raises(RequestError, match="Give an ImageRecipe of your own"):
            old.image  # noqa: B018

    def test_no_password_is_stored(self, server: Server, tmp_path: Path) -> None:
        """Neither in a run's folder nor in a message: an address is noted without it."""
        data = archive_data(f"http://me:SECRET@{server.host}")
        assert data.describe()["source"] == server.url
        with pytest.raises(RequestError, match=f"^{server.url} has 6 val"):
            data.eval("val", 99, 2, CPU)
        train(TrainSettings(steps=1, **QUICK), data, tmp_path / "run")
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert len(files) >= 3
        assert not [path for path in files if b"SECRET" in path.read_bytes()]

    def test_a_path_is_no_address(self, archive: Path, tmp_path: Path) -> None:
        """A folder's name is shown as it is, with what would be a query in an address."""
        place = shutil.copytree(archive, tmp_path / "a?b=c@d")
        assert archive_data(place).describe()["source"] == str(place)


class TestNormalisedCheckpoints:
    """An evaluation transforms images as the training did."""

    @pytest.fixture
    def trained(self, archive: Path, tmp_path: Path) -> Path:
        """A run on normalised images."""
        return train(TrainSettings(steps=1, normalize=True, **QUICK), archive_data(archive), tmp_path / "run").run_dir

    @pytest.fixture
    def others(self, make_dataset: Callable) -> EpisodeData:
        """Images of the same shape with another mean and deviation."""
        tiny = make_dataset(sizes={f"{a}/{b}": 4 for a in "abcd" for b in "xyz"}, size=28)
        return live_data(str(tiny.manifest_path), tiny.root, OPTIONS)

    @staticmethod
    def by_hand(run: Path, data: EpisodeData, normalize: bool | Normalization) -> Evaluation:
        """What is found on images that are normalised as told here."""

        class Told:
            describe = staticmethod(data.describe)

            def eval(self, *asked: Any, **how: Any) -> Iterable[EpisodeBatch]:
                return data.eval(*asked, **{**how, "normalize": normalize})

        return evaluate(run, Told(), episodes=4, device="cpu")

    @staticmethod
    def forget(run: Path) -> None:
        """As it was before the normalisation was noted."""
        path = find_last(run)
        content = torch.load(path, weights_only=True)
        del content["data"]["normalisation"]
        torch.save(content, path)
        config = json.loads((run / CONFIG).read_bytes())
        del config["data"]["normalisation"]
        (run / CONFIG).write_text(json.dumps(config))

    def test_other_data_are_normalised_as_in_training(self, trained: Path, others: EpisodeData, archive: Path) -> None:
        """By the training data's numbers, and not by their own."""
        found = evaluate(trained, others, episodes=4, device="cpu")
        assert found == self.by_hand(trained, others, read_archive(archive).normalization)
        assert found.loss != self.by_hand(trained, others, True).loss
        assert found.loss != self.by_hand(trained, others, False).loss

    def test_plain_training_is_evaluated_plain(self, archive: Path, others: EpisodeData, tmp_path: Path) -> None:
        """Though the checkpoint knows numbers; and one without them is as good."""
        run = train(TrainSettings(steps=1, **QUICK), archive_data(archive), tmp_path / "run").run_dir
        found = evaluate(run, others, episodes=4, device="cpu")
        assert found == self.by_hand(run, others, False)
        self.forget(run)
        assert evaluate(run, others, episodes=4, device="cpu") == found

    def test_a_checkpoint_that_does_not_say(self, trained: Path, others: EpisodeData, archive: Path) -> None:
        """Its own data have the numbers; other data are refused."""
        found = evaluate(trained, archive_data(archive), episodes=4, device="cpu")
        self.forget(trained)
        assert evaluate(trained, archive_data(archive), episodes=4, device="cpu") == found
        with pytest.raises(
            RequestError,
            match=r"does not record their mean and deviation. Evaluate it on .*: glyphs, .* digest [0-9a-f]{64}",
        ):
            evaluate(trained, others, episodes=4, device="cpu")

    def test_a_run_that_does_not_say_goes_on(self, trained: Path, archive: Path) -> None:
        """Its normalisation follows from its data, which are compared; from then on it is noted."""
        self.forget(trained)
        settings = TrainSettings(steps=2, normalize=True, **QUICK)
        assert train(settings, archive_data(archive), trained, resume=True).step == 2
        assert load_checkpoint(find_last(trained)).data["normalisation"]["mean"]


def test_views_have_a_limit_of_their_own(archive: Path) -> None:
    """At most that of what they are views of, which stays as it was."""
    whole = open_archive(archive, "val", episodes=5)
    view = whole.view(3)
    assert (whole.episodes, view.episodes, view.view().episodes, view.view(9).episodes) == (5, 3, 3, 3)
