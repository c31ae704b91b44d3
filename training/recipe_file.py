"""Recipe files: YAML and dotted overrides to the recipe of a stage. What is wrong is one line with file and key."""

import difflib
import re
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

from modeling_lavit.training.recipe import Arguments, Known, Recipe


class RecipeLoader(yaml.SafeLoader):
    """YAML that builds no objects, in which `1e-4` is a number, as everyone means it, and no key comes twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str | bytes, where: str):
    """
    Raises:
        ValueError: it is no YAML, or holds tags of objects.
    """
    try:
        return yaml.load(text, RecipeLoader)
    except RecursionError as error:
        raise ValueError(f"{where}: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: it is no plain YAML: {' '.join(str(error).split())}") from error


def read_values(path: Path, overrides: list[str]) -> dict:
    """What a recipe file says, with `a.b=value` overrides (values are YAML).

    Raises:
        OSError: there is no such file.
        ValueError: it, or an override, is no mapping of keys to values.
    """
    if not path.is_file():
        raise OSError(f"there is no recipe file {path}")
    values = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"is a {type(values).__name__}"
        raise ValueError(f"{path}: the recipe {found}; expected are keys with values, such as `data: …`")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ValueError(f"{path}: the override {override!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        node = values
        for number, parent in enumerate(parents, 1):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {'.'.join(parents[:number])}: expected are keys with values, got {node!r}")
        node[leaf] = parse_yaml(value, f"{path}: {key}")
    return values


def load_recipe(path: Path, overrides: list[str], recipe_class: type[Recipe]) -> Recipe:
    """The recipe of a stage.

    Raises:
        OSError: there is no such file.
        ValueError: one line that names file, key, and what is expected.
    """
    return validate(path, read_values(path, overrides), recipe_class)


def validate(path: Path, values: dict, recipe_class: type[Recipe]) -> Recipe:
    """The recipe of a stage that a file's values make; see [`load_recipe`]."""
    try:
        return recipe_class.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe(error, values, recipe_class)}") from error


def describe(error: ValidationError, values: dict, recipe_class: type[Recipe]) -> str:
    """The first wrong key, and what is expected there."""
    first, *others = error.errors()
    keys, node, section = [], values, recipe_class
    for part in first["loc"]:
        if not isinstance(node, dict) or (part not in node and first["type"] != "missing"):
            break  # parts that are no keys name one of several types
        if keys:
            section = _section_below(section, keys[-1])
        keys.append(str(part))
        node = node.get(part)
    key = ".".join(keys)
    if first["type"] == "missing":
        return f"{key}: is missing; {section.model_fields[keys[-1]].description}"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], section.model_fields, n=3)
        known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(_own_fields(section))}"
        return f"{key}: unknown key; {known}"
    if first["type"] == "value_error":
        return ": ".join(filter(None, (key, first["msg"].removeprefix("Value error, "))))
    same = [one["msg"] for one in (first, *others) if one["loc"][: len(keys)] == first["loc"][: len(keys)]]
    expected = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in same))
    return f"{key}: expected {expected}, got {first['input']!r:.80}"


def _section_below(section: type[BaseModel], key: str) -> type[BaseModel]:
    """The section under a key of a section, or the section itself where the key holds a value."""
    annotation = section.model_fields[key].annotation
    types = (annotation, *get_args(annotation))
    return next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), section)


def _own_fields(section: type[BaseModel]) -> list[str]:
    """Fields that are worth naming: not all that `TrainingArguments` has."""
    return [
        name for name in section.model_fields if name not in Known.model_fields or name in Arguments.__annotations__
    ]
