"""A full-size checkpoint in the layout of rain1011/LaVIT-7B-v2 with random weights, and what its conversion costs.

    python benchmarks/official_checkpoint.py write DIR
    python benchmarks/official_checkpoint.py convert DIR OUT [--dtype bfloat16]
    python benchmarks/official_checkpoint.py caption OUT IMAGE

`write` makes about 26 GB, shard by shard; `convert` runs the conversion and prints its time, rate and peak memory;
`caption` loads the result in bfloat16, captions one image and prints the same. Shapes: those of the released files.
"""

import argparse
import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch


C, F, N = 1408, 6144, 256
TEXT_VOCAB_SIZE, VOCAB_SIZE, SHARDS = 32000, 48386, 5
SMALL_TOKENIZER = Path(__file__).parents[1] / "tests/fixtures/e2e/checkpoint/language_model"


def linear(name: str, rows: int, columns: int) -> dict[str, tuple]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int = C) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_tower() -> dict[str, tuple]:
    """`visual_tokenizer/eva_vitg_psz14.bin`."""
    shapes = {"cls_token": (1, 1, C), "pos_embed": (1, N + 1, C)}
    shapes |= {"patch_embed.proj.weight": (C, 3, 14, 14), "patch_embed.proj.bias": (C,)}
    for i in range(40):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | linear(f"{block}.attn.proj", C, C)
        shapes |= {f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,), f"{block}.attn.qkv.weight": (3 * C, C)}
        shapes |= linear(f"{block}.mlp.fc1", F, C) | linear(f"{block}.mlp.fc2", C, F)
    return shapes | norm("norm") | linear("head", 1024, C)


def _block(block: str, self_attention: str, cross_attention: str) -> dict[str, tuple]:
    shapes = norm(f"{block}.norm0") | norm(f"{block}.norm1") | norm(f"{block}.norm2")
    shapes |= linear(f"{block}.{self_attention}.qkv", 3 * C, C) | linear(f"{block}.{self_attention}.proj", C, C)
    for name in ("query", "key", "value", "proj"):
        shapes |= linear(f"{block}.{cross_attention}.{name}", C, C)
    return shapes | linear(f"{block}.mlp.fc1", F, C) | linear(f"{block}.mlp.fc2", C, F)


def merger() -> dict[str, tuple]:
    """What `language_model/visual_weight.bin` says again, but for the projection."""
    shapes = norm("causal_encoder.ln_vision") | norm("causal_encoder.norm")
    for i in range(12):
        shapes |= _block(f"causal_encoder.blocks.{i}", "token_causal_attn", "token_cross_attn")
    return shapes


def projection() -> dict[str, tuple]:
    """Merged features to the width of the language model."""
    return linear("vit_proj", 4096, C)


def visual_tokenizer() -> dict[str, tuple]:
    """`visual_tokenizer/tokenizer_encoder.bin`."""
    shapes = norm("token_predictor.in_conv.0") | linear("token_predictor.in_conv.1", C, C)
    shapes |= linear("token_predictor.out_conv.0", 704, C) | linear("token_predictor.out_conv.2", 352, 704)
    shapes |= linear("token_predictor.out_conv.4", 2, 352) | merger() | {"quantize.embedding.weight": (16384, 32)}
    return shapes | linear("encode_task_layer.0", C, C) | linear("encode_task_layer.2", 32, C) | projection()


def decoder(variant: str) -> dict[str, tuple]:
    """`visual_tokenizer/tokenizer_decoder.bin` or `highres_tokenizer_decoder.bin`."""
    shapes = {"pos_embed": (1, N, C), "query_embed": (1, N, C)} | linear("in_proj", C, 32)
    for i in range(12):
        shapes |= _block(f"blocks.{i}", "self_attn", "cross_attn")
    shapes |= norm("norm") | linear("decode_task_layer.0", C, C) | linear("decode_task_layer.2", C, C)
    if variant == "lowres":
        return shapes | linear("unet_proj", 768, C)
    shapes |= linear("unet_proj_1", 768, C) | linear("unet_proj_2", 1280, C)
    shapes |= {"unet_attnpool.positional_embedding": (N + 1, C)}
    for name in ("k_proj", "q_proj", "v_proj"):
        shapes |= linear(f"unet_attnpool.{name}", C, C)
    return shapes | linear("unet_attnpool.c_proj", 1280, C)


def language_model() -> dict[str, tuple]:
    """`language_model/`, all shards."""
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, 4096)}
    for i in range(32):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (4096, 4096)
        shapes |= {f"{layer}.mlp.gate_proj.weight": (11008, 4096), f"{layer}.mlp.up_proj.weight": (11008, 4096)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (4096, 11008)}
        shapes |= {f"{layer}.{name}.weight": (4096,) for name in ("input_layernorm", "post_attention_layernorm")}
        # old checkpoints have it
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = (64,)
    return shapes | {"model.norm.weight": (4096,), "lm_head.weight": (VOCAB_SIZE, 4096)}


def random_weights(shapes: dict[str, tuple], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Normal weights of deviation .02, norms about one; cut from one pool of numbers, which is fast."""
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    weights = {}
    for key, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        start = zlib.crc32(key.encode()) % 1009
        values = pool[start:].repeat(-(-count // (len(pool) - start)))[:count].clone()  # no views: they save all
        is_norm = len(shape) == 1 and key.endswith("weight")
        weights[key] = (values + 1 if is_norm else values).reshape(shape).to(dtype)
    return weights


def write_text_tokenizer(folder: Path) -> None:
    """The small tokenizer of the tests, filled up to 32,000 pieces by single characters."""
    model = bytearray((SMALL_TOKENIZER / "tokenizer.model").read_bytes())
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from modeling_lavit.conversion.text_tokenizer import parse_sentencepiece

    known = {piece.piece for piece in parse_sentencepiece(bytes(model)).pieces}
    missing = TEXT_VOCAB_SIZE - len(known)
    characters = (chr(point) for point in range(0x3400, 0xD7A4) if chr(point) not in known)
    for rank, character in zip(range(missing), characters, strict=False):
        text = character.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e5 - rank)
        model += b"\x0a" + bytes([len(piece)]) + piece
    (folder / "tokenizer.model").write_bytes(model)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SMALL_TOKENIZER / name).read_bytes())


def write_component(model, folder: Path) -> None:
    """Config and one file of random half weights of a diffusers model that is on the meta device."""
    folder.mkdir(parents=True)
    model.save_config(folder)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    torch.save(random_weights(shapes, torch.float16), folder / "diffusion_pytorch_model.bin")


def write(folder: Path) -> None:
    """The whole directory."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    half, full = torch.float16, torch.float32
    visual, text = folder / "visual_tokenizer", folder / "language_model"
    for part in (visual, text):
        part.mkdir(parents=True)
    for name, shapes, dtype in (
        (visual / "eva_vitg_psz14.bin", vision_tower(), half),
        (visual / "tokenizer_encoder.bin", visual_tokenizer(), full),
        (visual / "highres_tokenizer_decoder.bin", decoder("highres"), full),
        (text / "visual_weight.bin", merger() | projection(), full),
    ):
        torch.save(random_weights(shapes, dtype), name)
        print(name, f"{name.stat().st_size / 1e9:.2f} GB", flush=True)
    index, shapes = {}, list(language_model().items())
    size = sum(torch.Size(shape).numel() for _, shape in shapes) / SHARDS
    shards, filled = [{}], 0
    for key, shape in shapes:
        if filled >= size and len(shards) < SHARDS:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled += torch.Size(shape).numel()
    for number, shard in enumerate(shards, 1):
        name = f"pytorch_model-{number:05}-of-{SHARDS:05}.bin"
        index |= dict.fromkeys(shard, name)
        torch.save(random_weights(shard, half), text / name)
        print(text / name, f"{(text / name).stat().st_size / 1e9:.2f} GB", flush=True)
    (text / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    (text / "config.json").write_text(json.dumps(config))
    write_text_tokenizer(text)
    decoding = folder / "highres_pixel_decoding"
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
        )
    write_component(unet, decoding / "unet")
    write_component(vae, decoding / "vae")
    DDIMScheduler().save_pretrained(decoding / "scheduler")
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {total / 1e9:.1f} GB")


class Watch:
    """Peak of a process's memory: all resident pages, and those that are its own and no mapped file's."""

    def __init__(self, process: subprocess.Popen):
        self.resident = self.own = 0
        started = time.time()
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if "kB" in line}
                self.resident = max(self.resident, numbers.get("VmHWM", 0))
                self.own = max(self.own, numbers.get("RssAnon", 0))
            except (OSError, IndexError, ValueError):
                pass
            time.sleep(0.05)
        self.seconds = time.time() - started
        if process.returncode:
            sys.exit(process.returncode)

    def __str__(self) -> str:
        return (
            f"{self.seconds:.0f} s, peak memory {self.resident * 1024 / 1e9:.2f} GB resident, of which at most "
            f"{self.own * 1024 / 1e9:.2f} GB the process's own and the rest mapped files"
        )


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def convert(folder: Path, output: Path, dtype: str | None) -> None:
    command = [sys.executable, "-m", "modeling_lavit.conversion", str(folder), str(output)]
    watch = Watch(subprocess.Popen(command + (["--dtype", dtype] if dtype else [])))
    read, written = size_of(folder), size_of(output)
    rate = (read + written) * 1e3 / watch.seconds
    print(f"converted {read:.1f} GB to {written:.1f} GB in {watch}; {rate:.0f} MB/s read and written")
    probe = output / "probe"
    block, started = bytes(2**26), time.time()
    with open(probe, "wb") as file:
        for _ in range(32):
            file.write(block)
        file.flush()
    print(f"the disk alone writes {2.147e3 / (time.time() - started):.0f} MB/s (2 GB, plain write)")
    probe.unlink()


def caption(folder: Path, image: str) -> None:
    script = (
        "import sys, time, torch; from PIL import Image\n"
        "from transformers import AutoModelForMultimodalLM, AutoProcessor\n"
        "import modeling_lavit\n"
        "folder, image = sys.argv[1:]; started = time.time()\n"
        "model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.bfloat16)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "print(f'loaded in {time.time() - started:.0f} s, {model.num_parameters() / 1e9:.2f} billion parameters')\n"
        "started = time.time(); inputs = processor(images=Image.open(image), return_tensors='pt')\n"
        "ids = model.generate(**inputs, generation_preset='caption')\n"
        "new = ids.shape[1] - inputs['input_ids'].shape[1]\n"
        "text = processor.post_process_answer(ids, input_ids=inputs['input_ids'])[0]\n"
        "print(f'captioned in {time.time() - started:.0f} s, {new} tokens: {text!r}')\n"
    )
    print(Watch(subprocess.Popen([sys.executable, "-c", script, str(folder), image])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("folder", type=Path)
    converting = commands.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("output", type=Path)
    converting.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    captioning = commands.add_parser("caption")
    captioning.add_argument("folder", type=Path)
    captioning.add_argument("image")
    options = parser.parse_args()
    if options.command == "write":
        write(options.folder)
    elif options.command == "convert":
        convert(options.folder, options.output, options.dtype)
    else:
        caption(options.folder, options.image)


if __name__ == "__main__":
    main()
