"""`lavit tokenize --dataset … --ray N`: the shards of [`ShardTokenizer`] as a Ray Data job, for clusters.

Every worker holds the model and writes the shards that it is given; Ray gives those of a lost worker to another. All
nodes must see the source, the checkpoint and the output folder under the same names.
"""

import os
from pathlib import Path

import torch

from modeling_lavit.training.data.tokenize_dataset import ShardTokenizer


try:
    import ray
except ImportError as error:
    raise ImportError("--ray needs Ray: pip install 'ray[data]'") from error


def absolute(name: str) -> str:
    """A name that workers in other folders find: the absolute path of what lies here, else the name itself."""
    return os.path.abspath(name) if os.path.exists(name) else name


def tokenize_with_ray(
    source: str,
    output: str | Path,
    model: str,
    workers: int,
    data_files: list[str] | None = None,
    streaming: bool = False,
    device: str | None = None,
    **options,
) -> str:
    """Computes the visual tokens of a source on the cluster that runs (`RAY_ADDRESS`), or on this machine.

    Args:
        workers: processes that hold the model.
        device: of the workers, `cuda` (one GPU each) or `cpu`; by default `cuda` where the cluster has GPUs.
        source, output, model, data_files, options: see [`ShardTokenizer`].

    Returns:
        a line that says what was done.

    Raises:
        ValueError: the source is streamed, of which no shard can be read by itself.
    """
    if streaming:
        raise ValueError("--ray cannot read a stream shard by shard: leave out --streaming or --ray")
    if not ray.is_initialized():
        ray.init()
    if device is None:
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    gpus = 1 if torch.device(device).type == "cuda" else 0
    options |= {"dtype": torch.bfloat16 if gpus else torch.float32}
    job = ShardTokenizer(output, source, model, data_files, device="cpu", **options)
    job.pin_settings()
    shards = [shard for shard, _ in job.shards()]
    pending = [{"shard": shard} for shard in shards if not job.is_written(shard)]
    if pending:
        written = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
            ShardTokenizer,
            fn_constructor_kwargs={
                "output": os.path.abspath(output),
                "source": absolute(source),
                "model": absolute(model),
                "data_files": data_files and [absolute(name) for name in data_files],
                "device": device,
                **options,
            },
            batch_size=1,
            concurrency=workers,
            num_gpus=gpus,
        )
        for _ in written.iter_rows():
            pass
    return job.summarize(shards, whole=True)
