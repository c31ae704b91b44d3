"""The README of a repository: its metadata as the Hub reads it, and a page from `model_card.md`.

A card is made of what lies in the folder: configurations, headers of weights, `training.json` of a training run, and
`evaluation/*.json`, the results of `lavit evaluate`. No figure is typed. A section that someone has changed, and
metadata that someone has written, stay when the card is generated again; every section ends with a mark of its text.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from transformers import AutoConfig

from modeling_lavit.atomic_lavit import weights_of
from modeling_lavit.configuration_lavit import LavitDetokenizerConfig
from modeling_lavit.loading_lavit import read_json_object, read_shapes
from modeling_lavit.saving_lavit import (
    ADAPTER_CONFIG,
    DIFFUSERS_CODE,
    REPOSITORY,
    TRANSFORMERS_CODE,
    is_on_hub,
)


README = "README.md"
KINDS = {"lavit": "reader", "lavit_visual_tokenizer": "visual_tokenizer", "lavit_detokenizer": "detokenizer"}
TITLES = {
    "adapter": "LoRA adapter of LaVIT",
    "decoder": "LaVIT's pixel decoder",
    "detokenizer": "LaVIT's detokenizer",
    "processor": "LaVIT's processor",
    "visual_tokenizer": "LaVIT's visual tokenizer",
}
PIPELINE_TAGS = {
    "pipeline": "any-to-any",
    "reader": "image-text-to-text",
    "adapter": "image-text-to-text",
    "visual_tokenizer": "image-feature-extraction",
}
# task of `lavit evaluate` -> of the Hub
TASKS = {
    "answers": "visual-question-answering",
    "captions": "image-to-text",
    "drawings": "text-to-image",
    "retrieval": "zero-shot-image-classification",
    "tokens": "image-feature-extraction",
}
MARK = "<!-- made by lavit-hf: {} -->"
MARKED = re.compile(r"<!-- made by lavit-hf: ([0-9a-f]{12}) -->")
SECTION = re.compile(r"^(?=## )", re.MULTILINE)
HEAD = re.compile(r"\A\s*---\n(.*?)\n---\s*\n", re.DOTALL)


def template() -> str:
    """The text of `model_card.md`."""
    here = Path(__file__).resolve().parents[1]
    path = next(p for p in (here / "model_card.md", here.parent / "model_card.md") if p.is_file())
    return path.read_text(encoding="utf-8")


def write_model_card(folder: Path, **options) -> None:
    """Writes the card of a folder; `options` of [`model_card`]."""
    there = folder / README
    card = model_card(folder, **options)
    if there.is_file():
        card = merge_cards(there.read_text(encoding="utf-8"), card)
    there.write_text(card, encoding="utf-8")


def model_card(
    folder: Path,
    tags: list[str] | None = None,
    extras: Path | None = None,
    repository: str = REPOSITORY,
    notice: str | None = None,
    **metadata,
) -> str:
    """The README of a folder.

    Args:
        folder: with the configurations and weights.
        tags: more tags.
        extras: a folder with `training.json`, `evaluation/` and sample images, by default the same.
        repository: its name on the Hub, for the examples.
        notice: the text on licences.
        metadata: more entries of the card's head: `license`, `base_model`, `datasets`, ...

    Raises:
        ValueError: the folder holds nothing that is known here, or a file in it is damaged.
    """
    extras = extras or folder
    kind, config = _kind(folder)
    training = _training(extras)
    results = _results(extras)
    data = _metadata(kind, folder, extras, repository, results, training, tags, metadata)
    page = jinja2.Template(template(), undefined=jinja2.StrictUndefined).render(
        kind=kind,
        title=TITLES.get(kind, "LaVIT"),
        repository=repository,
        base_model=getattr(data, "base_model", None),
        codebook_size=config.get("codebook_size"),
        facts=_facts(kind, folder, config),
        prompt=next(iter(_examples(extras).values()), "a red apple"),
        has_understanding=(folder / "understanding.safetensors").is_file(),
        samples="samples.png" if (extras / "samples.png").is_file() else None,
        lowres=(folder / "lowres").is_dir(),
        training={name: value for name, value in training.items() if name not in ("base_model", "datasets")},
        losses="losses.png" if training and (extras / "losses.png").is_file() else None,
        results=[_row(result) for result in results],
        formats=_formats(extras),
        notice=notice,
        licences=_licences(extras),
        code=_code(folder),
        version=_version(),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n" + _mark(re.sub(r"\n{3,}", "\n\n", page).strip())
    ModelCard(text, ignore_metadata_errors=False)
    return text + "\n"


def merge_cards(theirs: str, ours: str) -> str:
    """A card generated again, with what was changed in the one that is there.

    Args:
        theirs: the card that is there. Sections without a mark, or that differ from it, are someone's own, as are
            those that the new card has not. Sections of the empty form that peft writes are nobody's.
        ours: the new one.
    """
    head, own_head = (HEAD.match(card) for card in (theirs, ours))
    metadata = yaml.safe_load(own_head[1]) if own_head else {}
    try:
        written = (yaml.safe_load(head[1]) if head else None) or {}
    except yaml.YAMLError:
        return theirs
    if not isinstance(written, dict):
        return theirs
    _drop_local_bases(written)
    tags = list(dict.fromkeys([*_as_list(written.get("tags")), *_as_list(metadata.get("tags"))]))
    measured = {name: metadata[name] for name in ("model-index",) if name in metadata}
    metadata = {**metadata, **written, **measured, "tags": tags}
    new = {_title(section): section for section in _sections(HEAD.sub("", ours))}
    merged = []
    empty_form = {_without_versions(section) for section in _sections(ModelCard.from_template(ModelCardData()).text)}
    for section in _sections(HEAD.sub("", theirs)):
        if _without_versions(section) in empty_form:
            continue
        mark = MARKED.search(section)
        is_made = mark is not None and mark[1] == _digest(MARKED.sub("", section))
        made_again = new.pop(_title(section), None)
        merged.append((made_again if is_made and made_again else section).strip())
    first = [new.pop("").strip()] if "" in new else []
    merged = [*first, *merged, *(section.strip() for section in new.values())]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000).strip()
    return f"---\n{head}\n---\n\n" + "\n\n".join(merged) + "\n"


def _mark(page: str) -> str:
    return "\n\n".join(f"{section.strip()}\n\n{MARK.format(_digest(section))}" for section in _sections(page))


def _sections(page: str) -> list[str]:
    return [section for section in SECTION.split(page) if section.strip()]


def _without_versions(section: str) -> str:
    return section.split("### Framework versions")[0].strip()


def _drop_local_bases(metadata: dict) -> None:
    """Takes out base models that are folders on someone's machine, which peft writes down and the Hub refuses."""
    bases = [base for base in _as_list(metadata.pop("base_model", None)) if is_on_hub(str(base))]
    if bases:
        metadata["base_model"] = bases if len(bases) > 1 else bases[0]
    if "tags" in metadata:
        parts = [(tag, str(tag).split(":")) for tag in _as_list(metadata["tags"])]
        metadata["tags"] = [tag for tag, named in parts if named[0] != "base_model" or is_on_hub(named[-1])]


def _title(section: str) -> str:
    """Of a section; the part in front of the first one has none."""
    return section.strip().splitlines()[0] if section.strip().startswith("## ") else ""


def _digest(section: str) -> str:
    return hashlib.sha256(section.strip().encode()).hexdigest()[:12]


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _kind(folder: Path) -> tuple[str, dict]:
    if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        return "decoder", {}
    for name, kind in (("unet/config.json", "pipeline"), (ADAPTER_CONFIG, "adapter"), ("config.json", None)):
        if (folder / name).is_file():
            file = folder / ("config.json" if kind == "pipeline" else name)
            config = read_json_object(file)
            kind = kind or KINDS.get(config.get("model_type", ""))
            if kind:
                return kind, config
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return "processor", {}
    raise ValueError(f"{folder} holds no model, adapter, processor or pipeline of LaVIT")


def _facts(kind: str, folder: Path, config: dict) -> dict[str, str]:
    """Rows of the table on top."""
    files = sorted(file for file in folder.glob("model*.safetensors") if weights_of(file.name)[0])
    shapes = read_shapes(files, folder) or {}
    facts = {}
    if shapes and kind != "adapter":
        part = {"pipeline": " of the language model and the visual tokenizer"}.get(kind, "")
        facts[f"parameters{part}"] = f"{sum(map(_count, shapes.values())) / 1e6:,.1f} M"
    if kind in ("pipeline", "reader", "visual_tokenizer"):
        visual = AutoConfig.from_pretrained(folder)
        visual = getattr(visual, "visual_config", visual)
        side = visual.image_size
        facts["images that are read"] = f"{side} × {side} pixels, {visual.num_patches} patches"
        facts["visual codes"] = str(visual.codebook_size)
    if kind in ("pipeline", "decoder"):
        decoder = LavitDetokenizerConfig.from_pretrained(folder / "detokenizer")
        side = read_json_object(folder / "unet" / "config.json")["sample_size"]
        size = [decoder.vae_scale_factor * one for one in ([side, side] if isinstance(side, int) else side)]
        steps = decoder.default_num_inference_steps
        facts["images that are drawn"] = f"{size[0]} × {size[1]} pixels (height × width), {steps} denoising steps"
        if decoder.aspect_ratios:
            facts["aspect ratios"] = ", ".join(decoder.aspect_ratios)
    return facts


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _metadata(
    kind: str,
    folder: Path,
    extras: Path,
    repository: str,
    results: list[dict],
    training: dict,
    tags: list[str] | None,
    given: dict,
) -> ModelCardData:
    tagged = ["lavit", "arxiv:2309.04669", *(tags or [])]
    if kind == "pipeline":
        tagged += ["image-text-to-text", "text-to-image", "diffusers:LavitPipeline"]
    metadata = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": PIPELINE_TAGS.get(kind),
        "language": ["en"],
        "datasets": training.get("datasets"),
        "base_model": training.get("base_model"),
    }
    if kind == "adapter":
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        metadata["base_model"] = base if is_on_hub(base or "") else None
    metadata["base_model"] = given.get("base_model") or metadata["base_model"]
    if metadata["base_model"]:
        quantized = "quantization_config" in _kind(folder)[1]
        metadata["base_model_relation"] = "adapter" if kind == "adapter" else "quantized" if quantized else "finetune"
    widget = [{"text": prompt, "output": {"url": f"examples/{name}"}} for name, prompt in _examples(extras).items()]
    if widget:
        thumbnail = hf_hub_url(repository, widget[0]["output"]["url"])
        metadata |= {"widget": widget} | ({} if repository == REPOSITORY else {"thumbnail": thumbnail})
    if results:
        model_name = "LaVIT" if repository == REPOSITORY else repository.split("/")[-1]
        metadata |= {"model_name": model_name, "eval_results": [_eval_result(result) for result in results]}
    metadata |= given
    return ModelCardData(tags=tagged, **{name: value for name, value in metadata.items() if value is not None})


def _examples(extras: Path) -> dict[str, str]:
    """File -> prompt, of drawings for the widget; underscores stand for spaces."""
    return {file.name: file.stem.replace("_", " ") for file in sorted((extras / "examples").glob("*.png"))}


def _eval_result(result: dict) -> EvalResult:
    settings = result.get("settings") or {}
    return EvalResult(
        task_type=TASKS.get(result["task"]) or result["task"],
        dataset_type=re.sub(r"[^\w.-]+", "-", result["dataset"].lower()),
        dataset_name=result["dataset"],
        dataset_split=settings.get("split"),
        dataset_revision=(result.get("ids") or {}).get("sha256"),
        metric_type=re.sub(r"[^\w.-]+", "-", result["metric"].lower()).strip("-"),
        metric_name=f"{result['metric']}; {result['protocol']}",
        metric_value=round(result["score"], 4),
        metric_args={
            name: value for name, value in settings.items() if name != "split" and isinstance(value, str | int | float)
        }
        or None,
        verified=False,
    )


def _row(result: dict) -> dict:
    return {
        "dataset": result["dataset"],
        "split": (result.get("settings") or {}).get("split"),
        "metric": result["metric"],
        "score": f"{result['score']:.4g}",
        "samples": (result.get("ids") or {}).get("count", ""),
        "protocol": result["protocol"],
    }


def _results(extras: Path) -> list[dict]:
    results = []
    for result in _evaluations(extras):
        if {"dataset", "metric", "protocol", "task"} <= result.keys() and isinstance(result.get("score"), float | int):
            results.append(result)
    return results


def _evaluations(extras: Path) -> Iterator[dict]:
    """The results in all files; one file may hold several, as `results`."""
    for file in sorted((extras / "evaluation").glob("**/*.json")):
        if file.read_text(encoding="utf-8").lstrip().startswith("["):
            continue  # a submission, in the data set's own form
        content = read_json_object(file)
        several = content.get("results")
        yield from (one for one in several if isinstance(one, dict)) if isinstance(several, list) else [content]


def _formats(extras: Path) -> dict | None:
    """What `lavit evaluate formats` found."""
    return next((result for result in _evaluations(extras) if result.get("task") == "formats"), None)


def _training(extras: Path) -> dict:
    file = extras / "training.json"
    return read_json_object(file) if file.is_file() else {}


def _licences(extras: Path) -> str | None:
    files = sorted(p.name for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*") for p in extras.glob(pattern))
    return " and ".join(f"[{name}]({name})" for name in files) or None


def _code(folder: Path) -> dict[str, str]:
    files = (folder / f"{stem}.py" for stem in (TRANSFORMERS_CODE, DIFFUSERS_CODE))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _version() -> str:
    from modeling_lavit import __version__

    return __version__
