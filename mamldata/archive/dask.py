"""Workers on other machines: the executor of a Dask cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from mamldata.errors import MamldataError, RequestError

_SECONDS = 10.0  # for the scheduler to answer


@contextmanager
def dask_executor(address: str, seconds: float = _SECONDS) -> Iterator[tuple[Executor, int]]:
    """The executor of the Dask cluster whose scheduler is at ``address``, and how many workers it has at the moment.

    A task whose worker dies is given to another one by the scheduler; workers may come and go.

    Args:
        address: such as ``tcp://host:8786``.
        seconds: how long to wait for the scheduler.

    Raises:
        RequestError: the package ``distributed`` is not installed, or the address is none.
        MamldataError: no scheduler answers there; or, from the body, the cluster broke down or cannot run our code.
    """
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import CommClosedError, resolve_address
    except ImportError as error:
        raise RequestError(
            f"A Dask cluster needs one more package ({error}). Run: pip install 'mamldata[dask]'"
        ) from error
    try:
        resolve_address(address)  # a client would take half a minute to say that there is no such host
        client = Client(address, timeout=seconds, set_as_default=False)
    except ValueError as error:
        raise RequestError(f"{address!r} is no address of a Dask scheduler ({error}). Give tcp://host:8786.") from error
    except OSError as error:
        raise MamldataError(
            f"No Dask scheduler answers at {address} ({error}). Check that it runs, and its address."
        ) from error
    with _quiet(), client:
        try:
            yield client.get_executor(), len(client.nthreads())
        except KilledWorker as error:
            raise MamldataError(
                f"Several workers of the Dask cluster at {address} died over the same shard ({error}). Look into their "
                "logs (out of memory?), and run the same command again: it goes on from what is finished."
            ) from error
        except CommClosedError as error:
            raise MamldataError(
                f"The Dask scheduler at {address} is gone. Start the cluster, and run the same command again: it goes "
                "on from what is finished."
            ) from error
        except (ImportError, RuntimeError) as error:  # a scheduler without our modules gives the latter
            raise MamldataError(
                f"The Dask cluster at {address} cannot run this build ({str(error).partition(chr(10))[0]}). Install "
                "mamldata, and what its extra dask brings, in the same versions for the scheduler and all workers."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No log from Dask's client: it writes tracebacks of what becomes one sentence here."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
