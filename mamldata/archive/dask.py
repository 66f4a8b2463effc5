"""Workers on other machines: the executor of a Dask cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from mamldata.errors import MamldataError, RequestError
from mamldata.io.urls import shown_cause, shown_error, shown_place
from mamldata.words import install_command

_SECONDS = 10.0  # to wait for the scheduler's answer


@contextmanager
def dask_executor(address: str, seconds: float = _SECONDS) -> Iterator[tuple[Executor, int]]:
    """The executor of the Dask cluster whose scheduler is at ``address``, and how many workers it has now.

    Workers may come and go: the scheduler gives the task of a dead worker to another one.

    Args:
        address: such as ``tcp://host:8786``.
        seconds: how long to wait for the scheduler.

    Raises:
        RequestError: the package ``distributed`` is not installed, or the address is invalid.
        MamldataError: no scheduler answers; or, in the ``with`` block, the cluster fails or cannot run our code.
    """
    shown = shown_place(address)
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError, resolve_address
    except ImportError as error:
        raise RequestError(f"A Dask cluster needs another package ({error}). Run: {install_command('dask')}") from error
    try:
        resolve_address(address)  # for an unknown host, a client fails only after half a minute
        client = Client(address, timeout=seconds, set_as_default=False)
    except ValueError as error:
        raise RequestError(
            f"{shown!r} is not a Dask scheduler's address ({shown_error(error, address)}). Give tcp://host:8786."
        ) from shown_cause(error, address)
    except OSError as error:
        raise MamldataError(
            f"No Dask scheduler answers at {shown} ({shown_error(error, address)}). Check that it runs, and its "
            "address."
        ) from shown_cause(error, address)
    with _quiet(), client:
        try:
            yield client.get_executor(), len(client.nthreads())
        except KilledWorker as error:
            raise MamldataError(
                f"Several workers of the Dask cluster at {shown} died on the same shard "
                f"({shown_error(error, address)}). Check their logs (out of memory?), and run the same command again: "
                "it continues from the finished shards."
            ) from shown_cause(error, address)
        except CommClosedError as error:
            raise MamldataError(
                f"The Dask scheduler at {shown} is gone. Start the cluster, and run the same command again: it "
                "continues from the finished shards."
            ) from shown_cause(error, address)
        except (ImportError, RuntimeError) as error:  # RuntimeError: the scheduler lacks our modules
            raise MamldataError(
                f"The Dask cluster at {shown} cannot run this build "
                f"({shown_error(error, address).partition(chr(10))[0]}). Install "
                "mamldata and distributed in the same versions for the scheduler and all workers."
            ) from shown_cause(error, address)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of Dask's client: it writes tracebacks of errors that are one sentence here."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
