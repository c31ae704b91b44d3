"""The batches of an evaluation as a Ray Data job, for clusters: `lavit evaluate ... --ray N`.

Every worker holds the model; Ray gives the batches of a lost worker to another. The driver writes what comes back, so
that only it needs the output folder; all nodes must see the images and the checkpoint under the same names.
"""

import json
import os
from collections.abc import Callable, Sequence

import numpy as np

from .output import OutputFolder, pending_batches


try:
    import ray
except ImportError as error:
    raise ImportError("--ray needs Ray: pip install 'ray[data]'") from error


class RayWorker:
    """Holds a worker of an evaluation; takes Ray's batches of one row."""

    def __init__(self, worker: Callable, options: dict):
        self.predict = worker(**options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`{"items": (1,) JSON}` to `{"rows": (1,) JSON}`."""
        items = json.loads(batch["items"][0])
        rows = [{"key": item["key"], **row} for item, row in zip(items, self.predict(items), strict=True)]
        return {"rows": np.array([json.dumps(rows)])}


def run_with_ray(
    output: OutputFolder,
    items: Sequence[dict],
    worker: Callable,
    batch_size: int,
    unit: str,
    workers: int,
    device: str | None,
    options: dict,
) -> None:
    """Computes what is missing on the cluster that runs (`RAY_ADDRESS`), or on this machine. See `run_model`."""
    from tqdm import tqdm

    done = output.rows()
    # workers stand in a folder of their own
    items = [item | {"image": os.path.abspath(item["image"])} if "image" in item else item for item in items]
    pending = [{"items": json.dumps(batch)} for _, batch in pending_batches(items, done, batch_size)]
    if not pending:
        return
    if not ray.is_initialized():
        ray.init()
    if device is None:
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    if "folder" in options:
        options = options | {"folder": os.path.abspath(options["folder"])}
    model = options["model"]
    options = options | {"model": os.path.abspath(model) if os.path.exists(model) else model, "device": device}
    written = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
        RayWorker,
        fn_constructor_kwargs={"worker": worker, "options": options},
        batch_size=1,
        concurrency=workers,
        num_gpus=1 if device.startswith("cuda") else 0,
    )
    with tqdm(total=sum(item["key"] not in done for item in items), unit=unit, desc=f"{unit}s") as bar:
        for row in written.iter_rows():
            new = [one for one in json.loads(row["rows"]) if one["key"] not in done]
            output.append(new)
            bar.update(len(new))
