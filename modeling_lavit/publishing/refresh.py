"""Writes the code and the card of a saved folder again: `python -m modeling_lavit.publishing.refresh FOLDER`."""

import sys
from pathlib import Path

from modeling_lavit.loading_lavit import read_json_object
from modeling_lavit.pipeline_saving_lavit import TEXT_TO_IMAGE, write_modular_index
from modeling_lavit.saving_lavit import (
    DIFFUSERS_CODE,
    FAMILIES,
    TRANSFORMERS_CODE,
    edit_json,
    name_model,
    name_processor,
)

from .card import write_model_card
from .code import generate


def refresh_folder(folder: Path) -> None:
    """Has a folder that an earlier version saved carry this version's code, and a card of what lies in it now.

    What was changed in its README stays.
    """
    is_pipeline = (folder / "model_index.json").is_file()
    for stem, text in generate().items():
        if is_pipeline or stem == TRANSFORMERS_CODE:
            (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    processor, image_processor = (_auto_map(name) for name in ("LavitProcessor", "LavitImageProcessor"))
    edit_json(folder / "processor_config.json", lambda config: name_processor(config, processor | image_processor))
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("auto_map", None))
    for part in (folder, folder / "detokenizer"):
        if (part / "config.json").is_file():
            architecture = read_json_object(part / "config.json")["architectures"][0]
            task = TEXT_TO_IMAGE if is_pipeline and part == folder else None
            edit_json(part / "config.json", lambda config: name_model(config, _auto_map(architecture), task))  # noqa: B023
    name = [DIFFUSERS_CODE, "LavitPipeline"]
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name=name))
    if is_pipeline:
        write_modular_index(folder, read_json_object(folder / "model_index.json"))
    write_model_card(folder)


def _auto_map(name: str) -> dict[str, str]:
    family = next(family for family in FAMILIES if name in family)
    return {auto: f"{TRANSFORMERS_CODE}.{cls}" for cls, autos in family.items() for auto in autos}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        refresh_folder(Path(argument))
