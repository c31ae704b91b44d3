"""`convert`: an official LaVIT checkpoint directory to one folder in the Hub's layout, see `__init__.py`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, GenerationConfig, PreTrainedModel

from modeling_lavit.evaluation.sheets import find_images
from modeling_lavit.loading_lavit import build_on_meta, said_of
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.pipeline_lavit import LavitPipeline
from modeling_lavit.processing import LavitImageProcessor, LavitProcessor
from modeling_lavit.publishing.card import write_model_card

from . import keys, sizes
from .calibrate import calibrate
from .describing import describe_component, describe_folder, describe_reader
from .source import find_file, find_shards, load, load_shards, name_some, read_json
from .text_tokenizer import convert_text_tokenizer
from .writing import Plan, StateDict, check_space, plan_weights, whole_folder, write_weights


PIXEL_DECODERS = ("highres", "lowres", "both", "none")
LOWRES_FOLDER = "lowres"
# of each pixel decoder: its decoder's weights, and its folder
DECODER_STEM = {"highres": "highres_tokenizer_decoder", "lowres": "tokenizer_decoder"}
DECODER_FOLDER = {"highres": "highres_pixel_decoding", "lowres": "pixel_decoding"}
# `generate_image` of the reference
GENERATION_PRESETS = {"image": {"guidance_scale": 4.0}}
BASE_MODELS = {"highres": "rain1011/LaVIT-7B-v2", "lowres": "rain1011/LaVIT-7B"}
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
NOTICE = """\
The weights in this repository are those of LaVIT ({base_model}), converted to another layout: names of weights and the
files they lie in were changed{precision}, nothing else was.

LaVIT is licensed under the LaVIT Community License, Copyright (c) its authors. All Rights Reserved. Whoever uses these
weights, or passes them on, accepts that licence and passes it on with them; its text is in
[the original repository](https://github.com/jy0205/LaVIT). The language model was trained from LLaMA, the pixel
decoders from Stable Diffusion: their licences hold, too."""


@dataclass
class VisualWeights:
    """The official visual weights, as they count: later files replace what earlier ones say.

    Args:
        generation: of the visual tokenizer (`encoder.` in front of the vision tower's).
        reading: the same with what stage 2 trained for reading, `vit_proj.*` among it.
        stage2: the names that stage 2 says.
    """

    generation: StateDict
    reading: StateDict
    stage2: set[str]


def convert(
    official: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    pixel_decoder: str | None = None,
    encoder_heads: int | None = None,
    heads: int | None = None,
    language_model: str = "language_model",
    ignore_extra_keys: bool = False,
    calibration: str | Path | None = None,
    report: Callable[[str], None] = print,
):
    """Converts a checkpoint; `output` is written whole or not at all.

    Args:
        official: the official directory.
        output: the folder to write; must not exist, or be empty.
        dtype: of the written weights (codebooks stay as they are); `None` keeps each weight's.
        pixel_decoder: "highres", "lowres", "both" or "none"; `None` takes what the directory has. With both the high
            resolution is the folder's pipeline, and `lowres/` holds the other one's components:
            `LavitPipeline.from_pretrained(output, pixel_decoder="lowres")`.
        encoder_heads, heads: attention heads of the vision tower, and of merger and decoders, where they are not the
            official ones: see [`sizes.choose_heads`].
        language_model: its folder in the official directory.
        ignore_extra_keys: leave unknown weights of the visual tokenizer out, as the reference does, and report them.
        calibration: a folder of images (or one image): where no code of theirs changes by it, the merger is
            configured to compute kept patches alone, see [`calibrate`].
        report: called with lines about what was found.

    Raises:
        OSError: missing, truncated or damaged files; no space.
        ValueError: weights are missing, unknown or of wrong shapes; a file that asks to run code; `output` not empty.
    """
    official, output = Path(official), Path(output)
    if not official.is_dir():
        raise FileNotFoundError(f"there is no directory {official}")
    if pixel_decoder not in (None, *PIXEL_DECODERS):
        raise ValueError(f"pixel_decoder must be one of {PIXEL_DECODERS}, got {pixel_decoder!r}")
    images = find_images([calibration]) if calibration else []
    with whole_folder(output) as folder:
        variants = _variants(official, pixel_decoder)
        text_config = sizes.text_config(official / language_model)
        tokenizer, text_vocab_size = convert_text_tokenizer(
            official / language_model, text_config.max_position_embeddings
        )
        read_visual = partial(_read_visual, official, official / language_model, ignore_extra_keys)
        visual = read_visual(report=report)
        visual_config = sizes.visual_config(visual.generation, text_config, encoder_heads, heads)
        report(
            f"attention heads: {visual_config.num_attention_heads} in the vision tower, "
            f"{visual_config.merger_num_attention_heads} in merger and decoders (weights do not tell)"
        )
        num_visual_weights = len(visual.generation) + len(visual.reading)
        share_merger = _check_reading(visual)
        if share_merger:
            report("reading and drawing use equal merger weights: stored once")
        del visual

        config = sizes.lavit_config(text_config, visual_config, text_vocab_size, share_merger)
        shards = find_shards(official / language_model, "model", "pytorch_model")
        num_weights = len(load_shards(shards)) + num_visual_weights
        model = build_on_meta(
            lambda: LavitForConditionalGeneration(config).eval(),
            config.to_dict(),
            num_weights,
            official / language_model / "config.json",
        )
        model.generation_config = _generation_config(text_config)
        plans = [
            plan_weights(
                "language model and visual tokenizer",
                partial(_read_model, shards, read_visual, share_merger, config.tie_word_embeddings),
                _state_dict(model, config.tie_word_embeddings),
                "",
                "model",
                dtype,
                keys.official_name,
            )
        ]
        for part in (config, config.text_config, config.visual_config):
            part.dtype = dtype or plans[0].shapes["model.language_model.embed_tokens.weight"].dtype
        processor = LavitProcessor(
            LavitImageProcessor(size={"height": visual_config.image_size, "width": visual_config.image_size}),
            tokenizer,
            codebook_size=visual_config.codebook_size,
        )
        components: dict[str, Any] = {"processor": processor, "model": model}
        if variants:
            components |= _safety_checker(official, dtype, plans)
        decoders = {
            variant: _pixel_decoder(official, variant, visual_config, dtype, plans, "" if i == 0 else LOWRES_FOLDER)
            for i, variant in enumerate(variants)
        }

        check_space(sum(plan.num_bytes for plan in plans), folder)
        base_model = BASE_MODELS["highres" if "highres" in variants or _has(official, "highres") else "lowres"]
        precision = f", and their precision to {str(dtype).removeprefix('torch.')}" if dtype else ""
        card = {
            "notice": NOTICE.format(base_model=base_model, precision=precision),
            "license": "other",
            "license_name": "lavit-community-license",
            "license_link": "https://github.com/jy0205/LaVIT/blob/main/LICENSE",
            "base_model": base_model,
        }
        _write_description(folder, components, decoders)
        for file in _licence_files(official):
            shutil.copyfile(file, folder / file.name)
        total = sum(plan.num_bytes for plan in plans)
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as progress:
            for plan in plans:
                write_weights(plan, folder, progress)
        if images:
            calibrate(folder, visual_config, images, report)
        write_model_card(folder, **card)
    report(f"{output}: {total / 1e9:.2f} GB, pixel decoder: {' and '.join(variants) or 'none'}")


def _licence_files(official: Path) -> list[Path]:
    """Licences of the official directory; a link to a file elsewhere, but for the cache's own, is refused."""
    files = sorted(file for pattern in LICENSE_FILES for file in official.glob(pattern))
    inside = [official.resolve()]
    if official.resolve().parent.name == "snapshots":
        # huggingface_hub's cache: snapshots/COMMIT/LICENSE is a link into blobs/
        inside.append(official.resolve().parents[1] / "blobs")
    for file in files:
        if not file.is_file() or not any(file.resolve().is_relative_to(folder) for folder in inside):
            raise ValueError(f"{file} is a link or no file: copy the licence itself into the directory")
    return files


def _has(official: Path, variant: str) -> bool:
    return any((official / "visual_tokenizer").glob(f"{DECODER_STEM[variant]}.*"))


def _variants(official: Path, pixel_decoder: str | None) -> list[str]:
    if pixel_decoder is None:
        return [variant for variant in DECODER_STEM if _has(official, variant)]
    chosen = {"both": ["highres", "lowres"], "none": []}.get(pixel_decoder, [pixel_decoder])
    for variant in chosen:
        find_file(official / "visual_tokenizer", DECODER_STEM[variant])
    return chosen


def _read_visual(
    official: Path, language_model: Path, ignore_extra_keys: bool, report: Callable[[str], None] | None = None
) -> VisualWeights:
    folder = official / "visual_tokenizer"
    # one folder of the language model may go without: the reference reads it from the first one
    overrides = language_model if any(language_model.glob("visual_weight.*")) else official / "language_model"
    files = {name: find_file(folder, name) for name in ("eva_vitg_psz14", "tokenizer_encoder")}
    files["visual_weight"] = find_file(overrides, "visual_weight")
    contents = {}
    for name, path in files.items():
        content, reasons = keys.drop_known_extras(load(path))
        if name == "eva_vitg_psz14":
            content = {f"encoder.{key}": tensor for key, tensor in content.items()}
        unknown = {key for key in content if not keys.is_visual(key)}
        if unknown and not (ignore_extra_keys and name != "eva_vitg_psz14"):
            raise ValueError(f"{path} has unknown weights: {name_some(unknown)}; --ignore-extra-keys leaves them out")
        if report:
            for reason in sorted(set(reasons.values())):
                of_reason = [key for key, its_reason in reasons.items() if its_reason == reason]
                report(f"{path.name}: left out {name_some(of_reason)}: {reason}")
            if unknown:
                report(f"{path.name}: left out {name_some(unknown)}: unknown")
        contents[name] = {key: tensor for key, tensor in content.items() if key not in unknown}
    generation = contents["eva_vitg_psz14"] | contents["tokenizer_encoder"]
    return VisualWeights(generation, generation | contents["visual_weight"], set(contents["visual_weight"]))


def _check_reading(visual: VisualWeights) -> bool:
    """Whether reading has the merger of drawing; refuses other overrides, which one model could not hold."""
    merger = [key for key in visual.stage2 if key.startswith("causal_encoder.")]
    for key in visual.stage2 - set(merger):
        original = visual.generation.get(key)
        if key.startswith("vit_proj.") or original is None:
            continue
        if not torch.equal(visual.reading[key], original):
            raise ValueError(
                f"visual_weight holds another {key} than the visual tokenizer: only the merger (causal_encoder.*) and "
                "the projection (vit_proj.*) can differ between reading and drawing"
            )
    same = (key in visual.generation and torch.equal(visual.reading[key], visual.generation[key]) for key in merger)
    return all(same)


def _read_model(shards: dict, read_visual: Callable[[], VisualWeights], share_merger: bool, tied: bool) -> StateDict:
    """Everything in `LavitForConditionalGeneration`, under its names."""
    visual = read_visual()
    weights = {}
    for key, tensor in keys.rename_tokenizer(visual.generation).items():
        if not key.startswith("vit_proj."):
            weights[f"model.visual_tokenizer.{key}"] = tensor
    for key, tensor in keys.rename_tokenizer(visual.reading).items():
        if key.startswith("vit_proj."):
            weights[f"model.understanding.{key.replace('vit_proj', 'projection')}"] = tensor
        elif key.startswith("merger.") and not share_merger:
            weights[f"model.understanding.{key}"] = tensor
    language_model, _ = keys.drop_known_extras(load_shards(shards))
    if tied:
        language_model.pop("lm_head.weight", None)
    return weights | keys.rename_language_model(language_model)


def _safety_checker(official: Path, dtype: torch.dtype | None, plans: list[Plan]) -> dict:
    """The safety checker and its image processor, of either pixel decoder, where the directory has them."""
    source = official / DECODER_FOLDER["lowres"]
    if not (source / "safety_checker").is_dir():
        return {}
    if not (source / "feature_extractor").is_dir():
        raise FileNotFoundError(f"{source / 'feature_extractor'} is missing; the safety checker needs it")
    read = _reader(find_shards(source / "safety_checker", "model", "pytorch_model"), keys.rename_safety_checker)
    file = source / "safety_checker" / "config.json"
    read_json(file)
    with said_of(f"{file} describes no safety checker"):
        config = CLIPConfig.from_pretrained(source / "safety_checker")
    checker = build_on_meta(lambda: StableDiffusionSafetyChecker(config).eval(), config.to_dict(), len(read()), file)
    plans.append(plan_weights("safety checker", read, checker.state_dict(), "safety_checker", "model", dtype))
    parts: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for part in parts:
        part.dtype = dtype or torch.float32
    file = source / "feature_extractor" / "preprocessor_config.json"
    read_json(file)
    with said_of(f"{file} describes no image processor"):
        extractor = CLIPImageProcessor.from_pretrained(source / "feature_extractor")
    return {"safety_checker": checker, "feature_extractor": extractor}


def _pixel_decoder(
    official: Path, variant: str, visual_config, dtype: torch.dtype | None, plans: list[Plan], folder: str
) -> dict:
    """Detokenizer, UNet, VAE and scheduler of one pixel decoder, on the meta device; their weights join `plans`."""
    source = official / DECODER_FOLDER[variant]
    within = f"{folder}/" if folder else ""
    decoder_file = find_file(official / "visual_tokenizer", DECODER_STEM[variant])
    rows = 0
    if variant == "lowres":
        rows_file = find_file(source, "uncond_embeddings")
        rows = _unconditional_rows(rows_file).shape[0]
    config = sizes.detokenizer_config(load(decoder_file), variant, visual_config, rows)

    def read_detokenizer() -> StateDict:
        weights = keys.rename_detokenizer(load(decoder_file))
        encoder = load(find_file(official / "visual_tokenizer", "tokenizer_encoder"))
        weights["codebook.weight"] = encoder["quantize.embedding.weight"]
        if variant == "lowres":
            weights["unconditional_embedding"] = _unconditional_rows(rows_file)
        return weights

    detokenizer = build_on_meta(
        lambda: LavitDetokenizer(config).eval(), config.to_dict(), len(read_detokenizer()), decoder_file
    )
    plan = plan_weights(
        f"{variant} decoder", read_detokenizer, detokenizer.state_dict(), f"{within}detokenizer", "model", dtype
    )
    config.dtype = dtype or plan.shapes["in_proj.weight"].dtype
    plans.append(plan)
    components: dict[str, Any] = {"detokenizer": detokenizer}
    for name, model_class, rename in (
        ("unet", UNet2DConditionModel, None),
        ("vae", AutoencoderKL, keys.rename_vae),
    ):
        file = source / name / "config.json"
        loaded = read_json(file)
        shards = find_shards(source / name, "diffusion_pytorch_model")
        component = build_on_meta(
            lambda: model_class.from_config(loaded).eval(),  # noqa: B023  # pyright: ignore[reportAttributeAccessIssue]
            loaded,
            len(load_shards(shards)),
            file,
        )
        plans.append(
            plan_weights(
                f"{variant} {name}",
                _reader(shards, rename),
                component.state_dict(),
                f"{within}{name}",
                "diffusion_pytorch_model",
                dtype,
            )
        )
        components[name] = component
    file = source / "scheduler" / "scheduler_config.json"
    read_json(file)
    with said_of(f"{file} describes no scheduler"):
        components["scheduler"] = DDIMScheduler.from_pretrained(source / "scheduler")
    width = components["unet"].config.cross_attention_dim
    if width != sum(config.prompt_embed_dims):
        raise ValueError(
            f"the {variant} decoder makes conditions {sum(config.prompt_embed_dims)} wide, its UNet takes {width}"
        )
    return components


def _unconditional_rows(path: Path) -> torch.Tensor:
    """(rows, width) of `uncond_embeddings`."""
    tensors = list(load(path).values())
    if len(tensors) != 1 or tensors[0].ndim != 3 or not tensors[0].shape[0]:
        raise ValueError(f"{path} must hold one tensor (1, rows, width)")
    return tensors[0][0]


def _reader(shards: dict, rename: Callable[[StateDict], StateDict] | None) -> Callable[[], StateDict]:
    def read() -> StateDict:
        weights, _ = keys.drop_known_extras(load_shards(shards))
        return rename(weights) if rename else weights

    return read


def _state_dict(model: PreTrainedModel, tied: bool) -> StateDict:
    weights = model.state_dict()
    if tied:
        del weights["lm_head.weight"]
    return weights


def _generation_config(text_config) -> GenerationConfig:
    eos = text_config.eos_token_id
    ids = {"bos_token_id": text_config.bos_token_id, "eos_token_id": eos, "pad_token_id": eos}
    return GenerationConfig(**ids, generation_presets=GENERATION_PRESETS)


def _write_description(folder: Path, components: dict, decoders: dict):
    """Everything but the weights and the card."""
    if not decoders:
        describe_reader(components["model"], components["processor"], folder)
        return
    first, *others = decoders.values()
    describe_folder(LavitPipeline(**components, **first), folder)
    for other in others:
        for name, component in other.items():
            describe_component(component, folder / LOWRES_FOLDER / name)
