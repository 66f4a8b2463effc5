"""Benchmarks: test archives with a name and a pinned digest, as ``manifests/benchmarks.toml`` defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from mamldata.archive.index import Archive
from mamldata.archive.plan import BuildRequest
from mamldata.bank.format import Bank
from mamldata.datasets.toml import BENCHMARKS, builtin_names, sha256_fault
from mamldata.errors import DamagedError, ManifestError, RequestError, did_you_mean
from mamldata.io.toml import Table, read_toml
from mamldata.sampling.sampler import ROTATIONS
from mamldata.sampling.splits import SPLITS
from mamldata.version import __version__

FORMAT = "mamldata-benchmarks/1"


@dataclass(frozen=True)
class Benchmark:
    """An archive of one split that everybody can build, with the digest that it must have.

    Attributes:
        name: such as ``omniglot-5w1s``.
        dataset: a built-in one.
        split_scheme, rotations, n_way, k_shot, k_query, seed: as in ``BuildRequest``.
        split: the only one that has episodes.
        image_size: height and width in pixels.
        episodes: their number.
        bank_sha256, sha256: the digests of the bank and of the archive; None if they are not pinned yet.
    """

    name: str
    dataset: str
    split_scheme: str
    split: str
    rotations: str
    image_size: int
    n_way: int
    k_shot: int
    k_query: int
    episodes: int
    seed: int
    bank_sha256: str | None
    sha256: str | None

    @property
    def request(self) -> BuildRequest:
        """What to build."""
        return BuildRequest(
            n_way=self.n_way,
            k_shot=self.k_shot,
            k_query=self.k_query,
            episodes={self.split: self.episodes},
            seed=self.seed,
            split_scheme=self.split_scheme,
            rotations=self.rotations,
        )

    def folder(self, root: Path) -> Path:
        """Its default place under a data root."""
        return root / BENCHMARKS / self.name

    def require_bank(self, bank: Bank) -> None:
        """Check that a bank has the benchmark's images, before episodes are drawn from it.

        Raises:
            DamagedError: it has others.
        """
        if self.bank_sha256 not in {None, bank.sha256}:
            raise DamagedError(
                f"The benchmark {self.name} cannot be built from these images: the bank {bank.path} has sha256 "
                f"{bank.sha256}, but the benchmark's has {self.bank_sha256}. Copies of {self.dataset} differ in their "
                f"pixels: get the files that its manifest names (mamldata fetch {self.dataset}), and check them "
                f"(mamldata verify {self.dataset}). An accuracy on other images is not one on this benchmark."
            )

    def require_digest(self, archive: Archive, place: Path | str) -> None:
        """Check the digest of the finished archive, which was built from the benchmark's images.

        Args:
            archive: what was built.
            place: its folder or address, as shown to the user.

        Raises:
            DamagedError: it is another one.
        """
        if self.sha256 not in {None, archive.digest}:
            raise DamagedError(
                f"{place} is not the benchmark {self.name}: its digest is {archive.digest}, but the benchmark's is "
                f"{self.sha256}. The images are the benchmark's, so either a file was damaged, or this version of "
                f"mamldata ({__version__}) or of NumPy makes other archives. Run: mamldata verify {place}. If it is "
                "whole, try another version, and report this; if not, delete it and build it again."
            )


def benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        RequestError: there is none of that name; the message lists all.
    """
    known = benchmarks()
    if name not in known:
        raise RequestError(
            f"There is no benchmark {name!r}.{did_you_mean(name, known)} The benchmarks are {', '.join(known)}."
        )
    return known[name]


def benchmark_of(digest: str) -> Benchmark | None:
    """The benchmark whose archive has this digest."""
    return next((one for one in benchmarks().values() if one.sha256 == digest), None)


@cache
def benchmarks() -> Mapping[str, Benchmark]:
    """All benchmarks by name, in the order of the file."""
    file = f"{BENCHMARKS}.toml"
    return parse_benchmarks((resources.files("manifests") / file).read_bytes(), file)


def parse_benchmarks(data: bytes, source: str) -> dict[str, Benchmark]:
    """The benchmarks that a TOML file defines.

    Args:
        data: the file's bytes.
        source: its name, for messages.

    Raises:
        ManifestError: the TOML has faults; all are listed with their places.
    """
    faults: list[str] = []
    top = Table(read_toml(data, source), "", faults)
    if (declared := top.text("format")) not in {"", FORMAT}:
        top.fault("format", f"is {declared!r}; this version reads {FORMAT!r}")
    found = {name: _benchmark(name, top.table(name)) for name in top.values if name != "format"}
    if faults:
        raise ManifestError(source, faults)
    return found


def _benchmark(name: str, table: Table) -> Benchmark:
    found = Benchmark(
        name=name,
        dataset=table.choice("dataset", builtin_names()),
        split_scheme=table.text("split_scheme"),
        split=table.choice("split", SPLITS),
        rotations=table.choice("rotations", ROTATIONS),
        image_size=table.whole("image_size", 1, 4096),
        n_way=table.whole("n_way", 2),
        k_shot=table.whole("k_shot", 1),
        k_query=table.whole("k_query", 1),
        episodes=table.whole("episodes", 2),
        seed=table.whole("seed", 0),
        bank_sha256=table.text("bank_sha256", sha256_fault, required="sha256" in table.values) or None,
        sha256=table.text("sha256", sha256_fault, required="bank_sha256" in table.values) or None,
    )
    table.finish()
    return found
