"""How routes reach the engine's replicas: errors of the cluster become the API's, what died is asked again."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from modeling_lavit.serving.errors import ApiError
from modeling_lavit.serving.requests import Answer, Description, Drawing, Refusal, Writing


# a request that a dying replica took along is sent once more: its seed makes it the same request
ATTEMPTS = 2


class EngineClient:
    """Calls the engine's replicas.

    Args:
        handle: of the deployment [`LavitEngine`].
    """

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle
        self._description: Description | None = None

    async def describe(self) -> Description:
        """See [`LavitEngine.describe`]; asked once."""
        if self._description is None:
            self._description = await self._call("describe")
        return self._description

    async def draw(self, drawings: Iterable[Drawing]) -> list[Answer]:
        """An image for each; all, or an error."""
        return await all_or_none([self._call("draw", drawing) for drawing in drawings])

    async def write(self, writings: Iterable[Writing]) -> list[Answer]:
        """An answer for each; all, or an error."""
        return await all_or_none([self._call("write", writing) for writing in writings])

    async def stream(self, writing: Writing) -> AsyncIterator[str | Answer]:
        """Pieces of an answer, and then the whole. What broke off is not asked again: its pieces are sent."""
        generator = self.handle.options(stream=True).stream.remote(writing)
        try:
            async for piece in generator:
                yield _checked(piece)
        except (BackPressureError, RayActorError, DeploymentUnavailableError) as error:
            raise _told(error) from error
        finally:
            generator.cancel()

    async def _call(self, method: str, *arguments: Any) -> Any:
        for attempt in range(ATTEMPTS):
            response = getattr(self.handle, method).remote(*arguments)
            try:
                return _checked(await response)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (BackPressureError, RayActorError, DeploymentUnavailableError) as error:
                if attempt + 1 == ATTEMPTS or not isinstance(error, RayActorError):
                    raise _told(error) from error


def _checked(result: Any) -> Any:
    if isinstance(result, Refusal):
        raise ApiError(400, result.message, code="invalid_value")
    return result


def _told(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        return ApiError(429, "the queue is full: try again in a moment", code="queue_full", retry_after=1)
    return ApiError(503, "the model's process ended at this request: try again", code="replica_died", retry_after=5)


async def all_or_none(calls: list[Coroutine]) -> list:
    """The results of calls that run side by side; the first error, or a cancellation, ends them all."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
