"""`lavit evaluate formats`: what half precision and quantized weights change in what a checkpoint sees and says."""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from modeling_lavit import LavitForConditionalGeneration, LavitProcessor
from modeling_lavit.command_line.evaluate import FORMATS
from modeling_lavit.loading_lavit import weight_files

from .model_run import checkpoint_hash
from .output import replacing, write_json
from .reading import open_images
from .results import hash_ids, versions
from .run import choose
from .tokens import token_items


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
GROUP = 32


def load_in_format(source: str, name: str, device: torch.device | str) -> LavitForConditionalGeneration:
    """A checkpoint in one of `FORMATS`: int8 and int4 are weights alone, of linear layers, by torchao; the rest of the
    model is in bfloat16 then. What is saved from it loads in its format by `from_pretrained` alone.

    Raises:
        ImportError: torchao is missing.
    """
    if name in DTYPES or name == "float32":
        options = {"dtype": DTYPES.get(name, torch.float32)}
    else:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        except ImportError as error:
            raise ImportError(f"{name} needs torchao: pip install 'lavit-hf[quantization]'") from error
        from transformers import TorchAoConfig

        config = Int8WeightOnlyConfig()
        if name == "int4":
            # the packing that every device computes with; a byte a weight in the file
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
        options = {"dtype": torch.bfloat16, "quantization_config": TorchAoConfig(config)}
    return LavitForConditionalGeneration.from_pretrained(source, **options).to(device).eval()


@torch.no_grad()
def see_and_say(model, processor, images: list[Image.Image], batch_size: int) -> tuple[torch.LongTensor, list[str]]:
    """The code of each patch, (images, patches), -1 of dropped ones; and the captions."""
    codes, captions = [], []
    for start in tqdm(range(0, len(images), batch_size), desc="images", leave=False):
        batch = images[start : start + batch_size]
        inputs = processor(images=batch, text=["<image>"] * len(batch), return_tensors="pt").to(model.device)
        tokens = model.get_image_tokens(inputs["pixel_values"])
        of_patches = torch.full(tokens.keep_mask.shape, -1, device=tokens.codes.device)
        of_patches[tokens.keep_mask] = tokens.codes
        codes.append(of_patches.cpu())
        ids = model.generate(**inputs, generation_preset="caption")
        captions += processor.post_process_caption(ids, input_ids=inputs["input_ids"])
    return torch.cat(codes), captions


def changed_codes(codes: torch.LongTensor, others: torch.LongTensor) -> float:
    """Share of the patches that either keeps whose code is another one, or missing in the other."""
    kept = (codes >= 0) | (others >= 0)
    return float((codes != others)[kept].double().mean())


def saved_bytes(model) -> int:
    """Bytes of the weights as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in weight_files(folder))


def evaluate_formats(
    images: str | Path,
    output: str | Path,
    model: str,
    formats: tuple[str, ...] = FORMATS,
    device: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
) -> dict:
    """Compares formats of a checkpoint with float32, writes results.json and results.md.

    Args:
        images: a folder of images.
        output: folder of the evaluation.
        model: folder or repository.
        formats: some of `FORMATS`.
        limit, seed: a random choice of so many images.

    Raises:
        ValueError, OSError: there are no images, or one cannot be read.
    """
    items = choose(token_items(images), limit, seed)
    opened, _, errors = open_images(items)
    if errors:
        raise ValueError(f"{items[min(errors)]['key']}: {errors[min(errors)]}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = LavitProcessor.from_pretrained(model)
    rows = {}
    for name in ("float32", *formats):
        loaded = load_in_format(model, name, device)
        codes, captions = see_and_say(loaded, processor, opened, batch_size)
        if name == "float32":
            all_codes, all_captions = codes, captions
        rows[name] = {
            "bytes": saved_bytes(loaded),
            "codes_changed": changed_codes(all_codes, codes),
            "captions_changed": sum(map(str.__ne__, all_captions, captions)) / len(captions),
        }
    results = {
        "task": "formats",
        "dataset": Path(images).name,
        "protocol": f"against float32, on {device.type}; captions by the checkpoint's preset; int8 and int4: linear "
        "layers by torchao, the rest in bfloat16; a weight of int4 takes a byte in the file",
        "formats": rows,
        "settings": {"limit": limit, "seed": seed, "batch_size": batch_size, "int4_group": GROUP},
        "checkpoint": checkpoint_hash(model),
        "versions": versions("torch", "transformers", "torchao"),
        "ids": hash_ids(item["key"] for item in items),
    }
    Path(output).mkdir(parents=True, exist_ok=True)
    lines = ["| format | weights (MB) | codes changed | captions changed |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['bytes'] / 1e6:.1f} | {row['codes_changed']:.2%} | {row['captions_changed']:.2%} |"
        for name, row in rows.items()
    ]
    with replacing(Path(output) / "results.md") as partial:
        partial.write_text("\n".join(lines) + f"\n\n{len(items)} images; {results['protocol']}\n", encoding="utf-8")
    write_json(Path(output) / "results.json", results)
    return results
