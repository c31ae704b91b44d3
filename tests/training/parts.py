"""What training tests start from: rows, and tiny parts of a checkpoint whose weights depend on their names alone."""

import json
import zlib
from pathlib import Path

import torch
from datasets import Dataset, Image
from tiny import (
    tiny_config,
    tiny_detokenizer,
    tiny_model,
    tiny_processor,
    tiny_scheduler,
    tiny_unet,
    tiny_vae,
    tiny_visual_config,
)
from transformers import GenerationConfig

from modeling_lavit import LavitForConditionalGeneration, LavitImageProcessor, LavitProcessor


EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji"
EMOJI_SIZES = {"image_size": 48, "patch_size": 8, "stem": "convolutional", "selection": "argmax"}
SIZES = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "stem",
    ),
    *("selection", "merger_num_hidden_layers", "merger_num_attention_heads", "attention_epsilon"),
    *("codebook_size", "codebook_dim"),
)
DETOKENIZER_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_queries", "codebook_size"),
    *("codebook_dim", "feature_size", "variant", "prompt_embed_dims", "pooled_embed_dim", "num_unconditional_tokens"),
)


@torch.no_grad()
def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Every matrix gets normal numbers that depend on its name, every bias zeros."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if parameter.ndim > 1:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            parameter.zero_()
    return module


def sizes(**overrides) -> str:
    """The section `model` of a recipe for a tiny visual tokenizer."""
    config = tiny_visual_config(**overrides)
    return json.dumps({key: getattr(config, key) for key in SIZES})


def detokenizer_sizes(variant: str = "highres", **overrides) -> str:
    """The section `detokenizer` of a recipe."""
    config = detokenizer_of(variant, **overrides).config
    return json.dumps({key: getattr(config, key) for key in DETOKENIZER_SIZES})


def detokenizer_of(variant: str, **overrides):
    lowres = {"variant": "lowres", "prompt_embed_dims": (24,)} if variant == "lowres" else {}
    return tiny_detokenizer(**lowres, **overrides)


def write_rows(path: Path, count: int = 12) -> None:
    """Parquet of images of 96 pixels with texts, questions and messages."""
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()][:count]
    messages = [
        [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": row["name"]}]
        for row in rows
    ]
    columns = {
        "image": [{"bytes": (EMOJI / row["file_name"]).read_bytes(), "path": None} for row in rows],
        "text": [f"a {row['name']}" for row in rows],
        "question": ["what is it?"] * len(rows),
        "answer": [row["name"] for row in rows],
        "messages": messages,
    }
    Dataset.from_dict(columns).cast_column("image", Image(decode=False)).to_parquet(path)


def write_image_folder(folder: Path, count: int = 12) -> Path:
    """The same images as a folder with `metadata.jsonl`, as users have theirs."""
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()][:count]
    folder.mkdir()
    lines = []
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes((EMOJI / row["file_name"]).read_bytes())
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {row['name']}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def write_parts(folder: Path) -> None:
    """A LaVIT checkpoint, results of stage 1 and folders of Stable Diffusion, in both variants; rows."""
    model = fill(tiny_model())
    model.save_pretrained(folder / "lavit")
    tiny_processor().save_pretrained(folder / "lavit")
    tokenizer = model.model.visual_tokenizer
    for variant in ("lowres", "highres"):
        detokenizer = fill(detokenizer_of(variant))
        detokenizer.codebook.load_state_dict(tokenizer.quantizer.codebook.state_dict())
        tokenizer.save_pretrained(folder / variant / "visual_tokenizer")
        detokenizer.save_pretrained(folder / variant / "detokenizer")
        for name, component in (("unet", fill(tiny_unet(variant))), ("vae", fill(tiny_vae()))):
            component.save_pretrained(folder / f"diffusion_{variant}" / name)
        scheduler = tiny_scheduler("epsilon" if variant == "lowres" else "v_prediction")
        scheduler.save_pretrained(folder / f"diffusion_{variant}" / "scheduler")
    write_rows(folder / "rows.parquet")


def write_emoji_parts(folder: Path) -> None:
    """The same for images of 48 pixels with names and styles."""
    model = fill(LavitForConditionalGeneration(tiny_config(visual_config=tiny_visual_config(**EMOJI_SIZES))).eval())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder / "emoji_lavit")
    image_processor = LavitImageProcessor(size={"height": 48, "width": 48})
    processor = LavitProcessor(image_processor, tiny_processor().tokenizer, codebook_size=24)
    processor.save_pretrained(folder / "emoji_lavit")
    tokenizer = model.model.visual_tokenizer
    detokenizer = fill(tiny_detokenizer(num_queries=36))
    detokenizer.codebook.load_state_dict(tokenizer.quantizer.codebook.state_dict())
    tokenizer.save_pretrained(folder / "emoji_stage1" / "visual_tokenizer")
    detokenizer.save_pretrained(folder / "emoji_stage1" / "detokenizer")
    for name, component in (("unet", fill(tiny_unet())), ("vae", fill(tiny_vae()))):
        component.save_pretrained(folder / "emoji_pixels" / name)
    detokenizer.save_pretrained(folder / "emoji_pixels" / "detokenizer")
    tiny_scheduler("sample").save_pretrained(folder / "emoji_pixels" / "scheduler")


def read_log(run: Path) -> list[dict]:
    """The records of a run's steps."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]
