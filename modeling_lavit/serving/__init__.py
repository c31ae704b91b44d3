"""The server: OpenAI's routes for reading, drawing and editing, on Ray Serve and FastAPI.

    lavit serve                                      one machine
    serve run modeling_lavit.serving:app             the same application on a cluster, see examples/serve_cluster.yaml

A request takes this way: `api` (limits, key) -> `chat_routes` or `image_routes` (OpenAI's shapes, `schemas`) ->
`client` -> `engine` (one model on one thread), where `batching` runs what waits together together.
"""

try:
    import fastapi  # noqa: F401
    from ray import serve  # noqa: F401
except ImportError as error:
    raise ImportError("the server needs Ray Serve and FastAPI: pip install 'lavit-hf[serve]'") from error

from modeling_lavit.serving.application import app
from modeling_lavit.serving.settings import ServeSettings


__all__ = ["ServeSettings", "app"]
