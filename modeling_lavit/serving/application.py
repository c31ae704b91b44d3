"""The Ray Serve application: HTTP in one deployment, the model in another."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from modeling_lavit.serving.api import create_api
from modeling_lavit.serving.client import ReplicaClient
from modeling_lavit.serving.engine import LavitEngine
from modeling_lavit.serving.settings import ServeSettings


QUIET = {"log_level": "WARNING", "enable_access_log": False}
STOP_SECONDS = 60  # for requests in flight


class LavitServer:
    """HTTP: holds the application that `serve.ingress` builds, and no model."""

    def __init__(self, engine: DeploymentHandle):
        self.engine = engine

    async def drain(self, seconds: float) -> None:
        """See [`Server.drain`]."""
        await self.app.state.server.drain(seconds)


def app(settings: ServeSettings) -> Application:
    """Builds the application: `serve run modeling_lavit.serving:app model=organisation/checkpoint`.

    A config file's `deployments` may say more of the deployments `LavitEngine` (replicas, autoscaling, GPUs of each)
    and `LavitServer`.
    """
    engine = serve.deployment(
        LavitEngine,
        name=LavitEngine.__name__,
        num_replicas=settings.replicas,
        # one batch runs, the next one waits in the replica
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
    )

    def build():
        return create_api(settings, ReplicaClient(serve.get_deployment_handle(LavitEngine.__name__)), count_replicas)

    server = serve.deployment(
        serve.ingress(build)(LavitServer),
        name=LavitServer.__name__,
        # requests wait at the engine, where what is too much is refused as the API's error
        max_ongoing_requests=10_000,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return server.bind(engine.bind(settings))


async def count_replicas() -> int:
    """Replicas of the engine that run now; called within a replica."""
    name = serve.get_replica_context().app_name

    def running() -> int:
        deployment = serve.status().applications[name].deployments[LavitEngine.__name__]
        return deployment.replica_states.get("RUNNING", 0)

    return await asyncio.to_thread(running)


def serve_until_interrupted(settings: ServeSettings, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Runs the application on a Ray of its own on this machine, or on that of RAY_ADDRESS.

    After SIGINT or SIGTERM it takes no more requests, ends those in flight, and returns.

    Args:
        settings: of the server.
        host, port: to listen at.
        on_ready: called once requests are answered.

    Raises:
        OSError: the port is taken, or the model cannot be loaded.
    """
    with socket.create_server((host, port)):
        pass
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"include_dashboard": False, "num_cpus": os.cpu_count()} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    # Ray has put a handler of its own there, which aborts the process
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
        try:
            server = serve.run(app(settings), name="lavit", logging_config=QUIET)
        except RuntimeError as error:
            logs = "/tmp/ray/session_latest/logs/serve"
            raise OSError(f"the server did not start ({error}): the files of {logs} say why") from error
        on_ready()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        with contextlib.suppress(TimeoutError):
            server.drain.remote(STOP_SECONDS).result()
    finally:
        serve.shutdown()
        ray.shutdown()
