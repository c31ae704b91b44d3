"""The language model alone: lifted out as a stock one, and put back after others have tuned it."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_lavit.atomic_lavit import weights_of
from modeling_lavit.loading_lavit import read_config, wrong_shapes
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.processing import LavitProcessor

from .refresh import refresh_folder


# names of weights in a checkpoint of ours -> in the stock one
LIFT = {r"^model\.language_model\.": "model."}
# whose weights those are
PARTS = ("model.language_model.", "lm_head.")


def lift_language_model(source: str | os.PathLike, folder: str | os.PathLike) -> PreTrainedModel:
    """Writes the language model of a checkpoint as a stock one (`LlamaForCausalLM`) with the text tokenizer.

    Its vocabulary is that of text, `[IMG]`, `[/IMG]` and the visual codes.

    Args:
        source: folder or repository.
        folder: created if it does not exist.

    Raises:
        OSError: `source` is no checkpoint.
        ValueError: it lacks weights of the language model.
    """
    config = read_config(source)
    with torch.device("meta"):
        stock = type(AutoModelForCausalLM.from_config(config.text_config))
    model, info = stock.from_pretrained(source, key_mapping=LIFT, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks weights of its language model: {sorted(info['missing_keys'])[:3]}")
    # under its own names, not those that it was loaded from
    model.save_pretrained(folder, save_original_format=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return model


def put_back(
    language_model: str | os.PathLike, source: str | os.PathLike, folder: str | os.PathLike, image: Image.Image
) -> str:
    """Writes a checkpoint anew with a tuned language model in it; everything else of it stays as it is.

    Args:
        language_model: folder or repository of the tuned one.
        source: folder or repository of the checkpoint that it was lifted out of.
        folder: of the new checkpoint; must not exist.
        image: what the new checkpoint describes before anything is written.

    Returns:
        That description.

    Raises:
        OSError: `folder` exists, or one of the sources is no checkpoint.
        ValueError: the language model does not fit, see [`put_language_model_back`], or has gone silent.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name a new folder")
    model = LavitForConditionalGeneration.from_pretrained(source, dtype="auto").eval()
    put_language_model_back(model, AutoModelForCausalLM.from_pretrained(language_model, dtype=model.dtype))
    caption = describe(model, LavitProcessor.from_pretrained(source), image)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        if Path(source).is_dir():
            shutil.copytree(source, new)
        else:
            snapshot_download(str(source), local_dir=new)
        for file in new.glob("model*"):
            if weights_of(file.name)[1]:
                file.unlink()  # a variant, which has the language model as it was
        model.save_pretrained(new)
        refresh_folder(new)
        new.rename(folder)
    return caption


@torch.no_grad()
def put_language_model_back(model: LavitForConditionalGeneration, tuned: PreTrainedModel) -> None:
    """Gives `model` the weights of a language model that was lifted out and tuned.

    Raises:
        ValueError: it has other weights, or weights of another shape: which ones. Adapters are to be merged first.
    """
    theirs = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: weight
        for name, weight in tuned.state_dict().items()
    }
    ours = {name: weight for name, weight in model.state_dict().items() if name.startswith(PARTS)}
    differing = sorted(ours.keys() ^ theirs.keys())
    if differing:
        raise ValueError(
            f"the language model's weights have other names ({', '.join(differing[:3])}): is it one of another "
            "architecture, or does it have adapters that are not merged (merge_and_unload())?"
        )
    shapes = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (ours, theirs))
    wrong = wrong_shapes(*shapes)
    if wrong:
        name, found, wanted = wrong[0]
        raise ValueError(f"the language model has {name} {found}, the checkpoint {wanted}: it must keep its sizes")
    for name, weight in ours.items():
        weight.copy_(theirs[name])


def describe(model: LavitForConditionalGeneration, processor, image: Image.Image) -> str:
    """A caption, by which one sees at once whether a model still reads.

    Raises:
        ValueError: it says nothing, or its scores are no numbers.
    """
    inputs = processor(images=image, return_tensors="pt")
    output: Any = model.generate(
        **inputs, generation_preset="caption", num_beams=1, output_logits=True, return_dict_in_generate=True
    )
    caption = processor.post_process_caption(output.sequences, input_ids=inputs["input_ids"])[0]
    if not caption or not all(bool(logits.isfinite().any()) for logits in output.logits):
        raise ValueError("with this language model the checkpoint says nothing about an image: it is damaged")
    return caption
