"""Requests that wait together run together.

Ray's own `serve.batch` closes a batch when its first request has waited for the time given, also while the batch
before it still runs: under load it makes many small ones. Here a batch is closed when the model is free.
"""

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


# a lone request waits so long for others that come at the same moment
WAIT_SECONDS = 0.005


class AbandonedError(Exception):
    """Raised within a batch whose clients have all gone away."""


@dataclass(eq=False)
class Waiting:
    """One request: its settings, what is asked, and where the answer goes."""

    settings: Hashable
    request: Any
    future: asyncio.Future
    emit: Callable[[Any], object] | None = None

    @property
    def is_abandoned(self) -> bool:
        """Whether its client has gone away."""
        return self.future.cancelled()


class Batcher:
    """Hands requests of equal settings to `run`, as many as wait, on one thread; the oldest decides which settings.

    Args:
        run: called in that thread as `run(settings, batch)` with a list of [`Waiting`]; returns a result for each.
            A `ValueError` is told to the client at fault alone: the others run again without it.
        max_batch_size: requests that run together.
        wait_seconds: how long a request waits, when the model is free, for others to come along.
    """

    def __init__(
        self,
        run: Callable[[Any, list[Waiting]], list],
        max_batch_size: int,
        wait_seconds: float = WAIT_SECONDS,
    ):
        self.run, self.max_batch_size, self.wait_seconds = run, max_batch_size, wait_seconds
        self.waiting: list[Waiting] = []
        self.arrived = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.worker: asyncio.Task | None = None

    async def submit(self, settings: Hashable, request: Any, emit: Callable[[Any], None] | None = None) -> Any:
        """The result of one request. Cancelled, it frees its place.

        Args:
            settings: requests of the same run together.
            request: handed to `run`.
            emit: called in the event loop with what `run` gives to `Waiting.emit` on the way, from its thread.
        """
        loop = asyncio.get_running_loop()
        if self.worker is None:
            self.worker = loop.create_task(self._work())
        in_loop = None if emit is None else lambda piece: loop.call_soon_threadsafe(emit, piece)
        one = Waiting(settings, request, loop.create_future(), in_loop)
        self.waiting.append(one)
        self.arrived.set()
        try:
            return await one.future
        finally:
            if one in self.waiting:
                self.waiting.remove(one)

    async def _work(self) -> None:
        while True:
            await self.arrived.wait()
            await asyncio.sleep(self.wait_seconds)
            if not self.waiting:
                self.arrived.clear()
                continue
            settings = self.waiting[0].settings
            batch = [one for one in self.waiting if one.settings == settings][: self.max_batch_size]
            self.waiting = [one for one in self.waiting if one not in batch]
            await self._run(settings, batch)

    async def _run(self, settings: Hashable, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.thread, self.run, settings, batch)
        except AbandonedError:
            return
        except ValueError as error:
            if len(batch) == 1:
                _settle(batch[0], error=error)
                return
            for one in batch:
                if not one.is_abandoned:
                    await self._run(settings, [one])
            return
        except Exception as error:
            for one in batch:
                _settle(one, error=error)
            return
        for one, result in zip(batch, results, strict=True):
            _settle(one, result)


def _settle(one: Waiting, result: Any = None, error: Exception | None = None) -> None:
    if one.future.done():
        return
    if error is None:
        one.future.set_result(result)
    else:
        one.future.set_exception(error)
