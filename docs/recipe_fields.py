"""Tables of all fields that recipes have, from `training/recipe.py`."""

from typing import get_args

from pydantic import BaseModel

from modeling_lavit.training.recipe import Arguments, Known, Recipe
from modeling_lavit.training.run import STAGES


def section_of(annotation) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def rows(section: type[BaseModel], prefix: str = "", skipped: frozenset[str] = frozenset()) -> list[str]:
    """A Markdown row a field, fields of sections below it included."""
    found = []
    for name, field in section.model_fields.items():
        if name in skipped or (name in Known.model_fields and name not in Arguments.__annotations__):
            continue
        below = section_of(field.annotation)
        if below is not None:
            found += rows(below, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{field.default!r}`"
        description = (field.description or "").replace("|", "\\|")
        found.append(f"| `{prefix}{name}` | {default.replace('|', chr(92) + '|')} | {description} |")
    return found


def markdown() -> str:
    lines = []
    shared = frozenset(Recipe.model_fields) - {"training_arguments"}
    sections = {"All stages": (Recipe, frozenset({"stage", "training_arguments"}))}
    sections |= {f"`{name}`": (stage.recipe_class, shared) for name, stage in STAGES.items()}
    for title, (recipe, skipped) in sections.items():
        about = " ".join((recipe.__doc__ or "").split())
        lines += [f"### {title}", "", about, "", "| field | default | |", "|---|---|---|"]
        lines += [*rows(recipe, skipped=skipped), ""]
    return "\n".join(lines)
