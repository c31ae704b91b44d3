"""How routes reach the engine: on Ray, whose errors become the API's, or in the same process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from modeling_lavit.serving.errors import ApiError
from modeling_lavit.serving.requests import Answer, Description, Drawing, Refusal, Writing


# a request that a dying replica took along is sent once more: its seed makes it the same request
ATTEMPTS = 2
CLUSTER_ERRORS = (BackPressureError, RayActorError, DeploymentUnavailableError)


class Engine(Protocol):
    """What routes call: [`LavitEngine`], or its replicas by [`ReplicaClient`]."""

    async def describe(self) -> Description:
        """Sizes of images that the model draws and reads."""
        ...

    async def draw(self, drawing: Drawing) -> Answer | Refusal:
        """One image."""
        ...

    async def write(self, writing: Writing) -> Answer | Refusal:
        """One answer."""
        ...

    def stream(self, writing: Writing) -> AsyncIterator[str | Answer | Refusal]:
        """An answer in pieces, and then the whole."""
        ...


class ReplicaClient:
    """The engine's replicas on Ray Serve.

    Args:
        handle: of the deployment [`LavitEngine`].
    """

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle
        self._description: Description | None = None

    async def describe(self) -> Description:
        """See [`LavitEngine.describe`]; asked once."""
        description = self._description or await self._call("describe")
        self._description = description
        return description

    async def draw(self, drawing: Drawing) -> Answer | Refusal:
        """See [`LavitEngine.draw`]."""
        return await self._call("draw", drawing)

    async def write(self, writing: Writing) -> Answer | Refusal:
        """See [`LavitEngine.write`]."""
        return await self._call("write", writing)

    async def stream(self, writing: Writing) -> AsyncIterator[str | Answer | Refusal]:
        """See [`LavitEngine.stream`]. What broke off is not asked again: its pieces are sent."""
        generator = self.handle.options(stream=True).stream.remote(writing)
        try:
            # with `stream=True` the response is a generator
            async for piece in generator:  # pyright: ignore[reportGeneralTypeIssues]
                yield piece
        except CLUSTER_ERRORS as error:
            raise _told(error) from error
        finally:
            _cancel(generator)

    async def _call(self, method: str, *arguments: Any) -> Any:
        for attempt in range(ATTEMPTS):
            response = getattr(self.handle, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                _cancel(response)
                raise
            except CLUSTER_ERRORS as error:
                if attempt + 1 == ATTEMPTS or not isinstance(error, RayActorError):
                    raise _told(error) from error


def _cancel(response: DeploymentResponse | DeploymentResponseGenerator) -> None:
    # of a request that no replica took, Ray raises the reason once more
    with contextlib.suppress(*CLUSTER_ERRORS):
        response.cancel()


def _told(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        return ApiError(429, "the queue is full: try again in a moment", code="queue_full", retry_after=1)
    return ApiError(503, "the model's process ended at this request: try again", code="replica_died", retry_after=5)


async def ask_all(method: Callable[[Any], Awaitable[Answer | Refusal]], requests: Iterable[Any]) -> list[Answer]:
    """The answers of requests that run side by side; the first error, or a cancellation, ends them all.

    Args:
        method: an engine's `draw` or `write`.
        requests: of that.

    Raises:
        ApiError: 400, the model cannot do it; 429, the queue is full; 503, a replica died.
    """
    tasks = [asyncio.ensure_future(method(request)) for request in requests]
    try:
        return [checked(answer) for answer in await asyncio.gather(*tasks)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def checked(answer: Any) -> Any:
    """An answer, or a piece of one; a refusal is raised."""
    if isinstance(answer, Refusal):
        raise ApiError(400, answer.message, code="invalid_value")
    return answer
