"""A server in this process; only Ray is left out."""

import socket
import threading
import time

import openai
import uvicorn

from modeling_lavit.serving.api import create_api
from modeling_lavit.serving.engine import LavitEngine
from modeling_lavit.serving.settings import ServeSettings


class Running:
    """A server in a thread.

    Args:
        settings: of the server.
        engine: shared with other servers.
    """

    def __init__(self, settings: ServeSettings, engine: LavitEngine):
        async def count_replicas() -> int:
            return 1

        listening = socket.create_server(("127.0.0.1", 0))
        self.root = f"http://127.0.0.1:{listening.getsockname()[1]}"
        api = create_api(settings, engine, count_replicas)
        self.server = uvicorn.Server(uvicorn.Config(api, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, **options) -> openai.OpenAI:
        """OpenAI's own client for it."""
        return openai.OpenAI(base_url=f"{self.root}/v1", **({"api_key": "none", "max_retries": 0} | options))

    def stop(self) -> None:
        """Ends it."""
        self.server.should_exit = True
        self.thread.join()
