"""The Ray Serve application: HTTP in one deployment, the model in another."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

import ray
import torch
from fastapi import FastAPI
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

    app: FastAPI

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
        ray_actor_options=resources(settings),
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
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.2,
    )
    return server.bind(engine.bind(settings))


def resources(settings: ServeSettings) -> dict[str, float]:
    """Of one replica of the model: a GPU, or its share of the cores (Ray gives it as many threads, at least one)."""
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    cores = (os.cpu_count() or 1) / settings.replicas
    return {"num_cpus": int(cores) if cores >= 1 else cores}


async def count_replicas() -> int:
    """Replicas of the engine that run now; called within a replica."""
    name = serve.get_replica_context().app_name

    def running() -> int:
        deployment = serve.status().applications[name].deployments[LavitEngine.__name__]
        states: dict[str, int] = {**deployment.replica_states}
        return states.get("RUNNING", 0)

    return await asyncio.to_thread(running)


def serve_until_interrupted(settings: ServeSettings, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Runs the application on a Ray of its own on this machine, or on that of RAY_ADDRESS.

    After SIGINT or SIGTERM it takes no more requests, ends those in flight, and returns.

    Args:
        settings: of the server.
        host, port: to listen at.
        on_ready: called once requests are answered.

    Raises:
        OSError: the model cannot be loaded.
        ValueError: there are fewer GPUs than replicas.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"include_dashboard": False, "num_cpus": os.cpu_count()} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        wanted = resources(settings).get("num_gpus", 0) * settings.replicas
        if local and wanted > (found := ray.cluster_resources().get("GPU", 0)):
            # Ray would wait for more, for ever
            raise ValueError(f"{settings.replicas} replicas need {wanted} GPUs, this machine has {found:g}")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
        try:
            server = serve.run(app(settings), name="lavit", logging_config=QUIET)
        except RuntimeError as error:
            logs = "/tmp/ray/session_latest/logs/serve"
            raise OSError(f"the server did not start ({error}): the files of {logs} say why") from error
        # Ray's own handler aborts the process; a second signal must not interrupt the stop
        signals: list[int] = []
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda number, frame: signals.append(number))
        on_ready()
        while not signals:
            time.sleep(0.2)
        with contextlib.suppress(TimeoutError):
            server.drain.remote(STOP_SECONDS).result()
    finally:
        serve.shutdown()
        ray.shutdown()
