"""Peak memory of the stages of drawing and reading, each in a process of its own (Linux: it is read from /proc)."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from modeling_lavit import LavitConfig, LavitForConditionalGeneration, LavitVisualTokenizerConfig


STAGES = {
    "import": "",
    "load the language model": """
model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
""",
    "read an image": """
model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
size = model.config.visual_config.image_size
model.get_image_tokens(torch.randn(1, 3, size, size))
""",
    "draw visual tokens": """
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=dtype)
pipe.set_progress_bar_config(disable=True)
pipe.generate_visual_tokens("red apple")
""",
    "draw an image": """
pipe = LavitPipeline.from_pretrained(checkpoint, dtype=dtype)
pipe.set_progress_bar_config(disable=True)
pipe("red apple")
""",
}
PROGRAM = """
import sys, torch
from modeling_lavit import LavitForConditionalGeneration, LavitPipeline
checkpoint, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_grad_enabled(False)
{stage}
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith(("VmHWM", "RssAnon"))))
"""

# each way of doing the same at the official widths; the official way as its files and their loading are: the tokenizer
# in float32, built and then filled from a pickle, its matrices converted afterwards, and a class for each task that
# loads tokenizer and language model for itself
OFFICIAL = """
from transformers import LlamaForCausalLM
from modeling_lavit import LavitVisualTokenizer, LavitVisualTokenizerConfig
def load():
    tokenizer = LavitVisualTokenizer(LavitVisualTokenizerConfig.from_pretrained(checkpoint + "/official")).eval()
    tokenizer.load_state_dict(torch.load(checkpoint + "/official/tokenizer.bin", weights_only=True))
    for module in tokenizer.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(dtype)
    return tokenizer, LlamaForCausalLM.from_pretrained(checkpoint + "/official/language_model", dtype=dtype).eval()
def read(tokenizer, language_model):
    features = tokenizer.encode(torch.randn(1, 3, 224, 224), keep_ratio=0.36).features
    embeds = torch.zeros(1, len(features) + 8, language_model.config.hidden_size, dtype=dtype)
    language_model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=4)
def draw(tokenizer, language_model):
    ids = torch.tensor([[1, 3, 4, 5], [1, 3, 4, 5]])
    language_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
"""
OURS = """
def load(**options):
    return LavitForConditionalGeneration.from_pretrained(checkpoint + "/ours", dtype=dtype, **options).eval()
boi = 1000
def read(model):
    pixel_values = torch.randn(1, 3, 224, 224)
    model.generate(torch.tensor([[1, boi, boi + 1]]), pixel_values=pixel_values, max_new_tokens=4)
def draw(model):
    limits = {"min_image_tokens": 4, "max_image_tokens": 4}
    model.generate(torch.tensor([[1, 3, 4, boi]]), generation_mode="image", guidance_scale=3.0, **limits)
"""
SIDES = {
    "read an image": ("read(load())", "read(*load())"),
    "draw visual tokens": ("draw(load(generation_only=True))", "draw(*load())"),
    "do both": ("model = load(); read(model); draw(model)", "one, two = load(), load(); read(*one); draw(*two)"),
}
# a fifth of the official depths, so that tokenizer and language model stand in the same proportion
FIFTH = {"num_hidden_layers": 8, "merger_num_hidden_layers": 2}
FIFTH_OF_LLAMA = 6


@dataclass(frozen=True)
class Peaks:
    """Megabytes of one process.

    Args:
        resident: at the most, mapped files included.
        own: at the end, without these.
    """

    resident: float
    own: float


def peak_memory(checkpoint: str, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> dict[str, list[float]]:
    """Stage -> megabytes resident at the most, for each dtype."""
    return {stage: [_run(code, checkpoint, dtype).resident for dtype in dtypes] for stage, code in STAGES.items()}


def peaks_beside_official_way() -> dict[str, tuple[Peaks, Peaks]]:
    """What is done -> ours, and the official way; bfloat16, the official widths, a fifth of the depths."""
    with TemporaryDirectory() as folder:
        _write_both(Path(folder))
        return {
            name: (_run(OURS + ours, folder, "bfloat16"), _run(OFFICIAL + theirs, folder, "bfloat16"))
            for name, (ours, theirs) in SIDES.items()
        }


def _run(stage: str, checkpoint: str, dtype: str) -> Peaks:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(stage=stage), checkpoint, dtype],
        cwd=Path(__file__).parents[1],
        env=os.environ | quiet,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Peaks(*(int(number) / 1024 for number in done.stdout.split()[-2:]))


def _write_both(folder: Path) -> None:
    """Random weights as a checkpoint of ours in bfloat16, and as the official files."""
    text = LlamaConfig(
        vocab_size=1002 + 16384,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=FIFTH_OF_LLAMA,
        num_attention_heads=32,
        max_position_embeddings=1024,
    )
    official = folder / "official"
    LlamaForCausalLM._from_config(text, dtype=torch.bfloat16).save_pretrained(official / "language_model")
    config = LavitConfig(text_config=text, visual_config=LavitVisualTokenizerConfig(**FIFTH), text_vocab_size=1000)
    model = LavitForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.config.visual_config.save_pretrained(official)
    torch.save(model.model.visual_tokenizer.state_dict(), official / "tokenizer.bin")
    model.to(torch.bfloat16).save_pretrained(folder / "ours")
