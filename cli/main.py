"""The group of all verbs. A verb's module is imported only when the verb is used, so that ``--help`` is fast."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cli.output import Manner, drop_output, say
from mamldata.errors import LostPeerError, MamldataError, PeerError, StoppedError, did_you_mean, system_problem
from mamldata.io.urls import is_remote, shown_place
from mamldata.version import __version__
from mamldata.words import printable

# Each verb and its line in the overview. The module of the same name in ``cli.commands`` defines it as ``command``.
VERBS = {
    "datasets": "List the datasets, and which files of them are here.",
    "benchmarks": "List the benchmarks, test archives with pinned digests.",
    "fetch": "Get a dataset's raw files and verify them.",
    "verify": "Hash all files of a dataset or an archive again.",
    "build": "Build an archive of episodes.",
    "inspect": "Show an archive's contents and its digest.",
    "preview": "Draw an episode as a picture.",
    "recipes": "List the settings of published experiments.",
    "train": "Train on an archive or on live episodes.",
    "eval": "Evaluate a checkpoint.",
    "compare": "Train with several algorithms on the same episodes.",
    "report": "Write a page on an archive, a run or a comparison.",
    "export": "Write a trained network as a safetensors file, with a card.",
    "models": "List the models that come with the package.",
    "predict": "Say to which of your classes your images belong.",
    "cite": "Print BibTeX for an archive, a benchmark or a run.",
    "card": "Write a dataset card and Croissant metadata beside an archive.",
    "manifest": "Write a manifest for your own files.",
    "doctor": "Print what a bug report needs to say about this machine.",
}

EPILOG = """\b
Example, without a network:
  mamldata fetch glyphs
  mamldata build glyphs --out glyphs-5w1s
  mamldata train glyphs-5w1s --steps 200 --out run
"""


_NO_MEMORY = (
    "There is not enough memory. Free some, or ask for less (fewer workers, smaller images or batches), and run the "
    "same command again: finished work is kept."
)
_PATIENCE = 10  # seconds that a silent process waits for the one that shows the error


class Failure(click.ClickException):
    """Show an error of ours as click does: its message on stderr and its exit code, without a traceback."""

    def __init__(self, error: MamldataError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click's own way of giving one


class Verbs(click.Group):
    """A group that knows its commands by name and imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All verbs, in the order in which they are used."""
        return list(VERBS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options of the group, and keep all words for ``_hide_keys``."""
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; if it is misspelt, suggest one."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"cli.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the overview from ``VERBS``, without importing the modules."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, and end the process."""
        # Threads that share one of torch's operations wait for the last of them by spinning. By default they spin so
        # long that, on a busy machine, they take the processor time that the last one needs. With this value, which
        # libgomp reads when torch is loaded, they still spin long enough to be awake for the next operation.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        for stream in (sys.stdout, sys.stderr):
            # A terminal may lack the letters of a name, and a name may be bytes that are no text.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # of what click itself prints, such as the help, to a full disk
            drop_output()
            click.echo(f"Error: The output cannot be written: {system_problem(error)}", err=True)
            sys.exit(1)
        except SystemExit as end:
            if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(end.code, int | None):
                # If gloo's threads free their last tensors while the interpreter shuts down, the process sometimes
                # aborts (torch 2.15), and torchrun would report a failure of a finished job.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; show errors that a user can fix without a traceback."""
        try:
            return self._invoke(ctx)
        except MamldataError as error:
            _speak_or_leave(error)
            if isinstance(error, StoppedError):  # the user asked for it, so it is not shown as an error
                say(str(error))
                raise click.exceptions.Exit(error.exit_code) from error
            raise Failure(error) from error
        except click.UsageError as error:
            hidden = _hide_keys(error.message, ctx.meta["words"])
            error.message = printable(hidden, keep="\n")  # type: ignore[misc]  # it is shown from there
            _speak_or_leave(error)
            raise
        except (OSError, MemoryError) as error:
            if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
                raise click.ClickException(_NO_MEMORY) from error
            if error.errno in {None, errno.EPIPE}:
                raise
            raise click.ClickException(printable(system_problem(error))) from error
        except KeyboardInterrupt as error:
            if not _shows(error):
                raise click.exceptions.Exit(1) from None
            raise click.ClickException(
                "Interrupted. Run the same command again (train: with --resume) to continue."
            ) from None

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MamldataError, OSError, MemoryError):
            if Manner.verbose:
                say(_hide_keys(traceback.format_exc(), ctx.meta["words"]).rstrip())
            raise


def _hide_keys(message: str, words: Iterable[str]) -> str:
    """A message of click, which repeats words of the command line, with their addresses as they may be shown."""
    for word in words:
        for place in filter(is_remote, (word.partition("=")[2], word)):
            for text in (place, repr(place)[1:-1]):
                message = message.replace(text, shown_place(place))
    return message


def _shows(error: BaseException) -> bool:
    """Whether this process of a job shows an error, which other processes may have too."""
    if isinstance(error, PeerError):
        return False  # the failed process shows it
    if isinstance(error, StoppedError | KeyboardInterrupt):
        return os.environ.get("RANK", "0") == "0"
    if isinstance(error, click.UsageError):
        return os.environ.get("LOCAL_RANK", "0") == "0"  # once for each machine: a file may be missing on one of them
    if isinstance(error, LostPeerError):
        return os.environ.get("LOCAL_RANK", "0") in {"0", "1"}  # 0 or 1 may be the lost process itself
    return True


def _speak_or_leave(error: MamldataError | click.UsageError) -> None:
    """Tell torchrun of an error; if another process shows it, wait for that, and leave.

    When one process ends, torchrun ends all others by SIGTERM.
    """
    _tell_torchrun(error)
    if not _shows(error):
        if not isinstance(error, StoppedError):  # all have saved, and a scheduler may be waiting
            time.sleep(_PATIENCE)
        raise click.exceptions.Exit(error.exit_code) from error


def _tell_torchrun(error: Exception) -> None:
    """Write the message to the file from which torchrun reports the cause of a failure."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # the message is shown in any case
            Path(place).write_text(json.dumps({"message": told}))


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mamldata")
@click.option("-q", "--quiet", is_flag=True, help="Print results and errors only: no messages, no progress.")
@click.option("-v", "--verbose", is_flag=True, help="Also say how long each part took, and where an error arose.")
@click.pass_context
def main(ctx: click.Context, quiet: bool, verbose: bool) -> None:
    """Few-shot datasets as verified, bit-reproducible episode archives, and a lean MAML trainer."""
    if quiet and verbose:
        raise click.UsageError("Give either --quiet or --verbose, not both.")
    ctx.with_resource(_manner(quiet, verbose))


@contextlib.contextmanager
def _manner(quiet: bool, verbose: bool) -> Iterator[None]:
    Manner.quiet, Manner.verbose = quiet, verbose
    yield
    Manner.quiet = Manner.verbose = False
