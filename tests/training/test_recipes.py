"""What a recipe says is read, completed by defaults, or named with its file and key in one line."""

from pathlib import Path

import pytest
import yaml
from parts import write_parts

from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.command_line import main as lavit
from modeling_lavit.training.emoji import train as emoji
from modeling_lavit.training.recipe import Arguments, LanguageModelRecipe, Section, TokenizerRecipe
from modeling_lavit.training.recipe_file import load_recipe, read_values
from modeling_lavit.training.run import RECIPES, STAGES, training_arguments


ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path) -> Path:
    """A recipe of stage 1 that is whole."""
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: tokenizer\ndata: {path: images}\nencoder: lavit-emoji\n")
    return path


def load(path: Path, *overrides: str) -> TokenizerRecipe:
    return load_recipe(path, list(overrides), TokenizerRecipe)


@pytest.mark.parametrize("path", [*RECIPES.glob("*.yaml"), *emoji.RECIPES.glob("*.yaml")], ids=lambda path: path.stem)
def test_shipped_recipes_are_short_and_valid(path):
    assert len(path.read_text().splitlines()) <= 25
    stage = emoji.STAGES[read_values(path, [])["stage"]]
    assert load_recipe(path, [], stage.recipe_class).training_arguments.output_dir.startswith("runs/")


def test_the_papers_settings_are_the_defaults(file):
    objective = load(file).objective
    assert (objective.keep_rate, objective.rate_weight, objective.commitment_weight) == (1 / 3, 2.0, 0.0)


def test_of_a_section_that_is_given_in_part_the_rest_stays(tmp_path):
    recipe_class = emoji.STAGES["emoji-tokenizer"].recipe_class
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: emoji-tokenizer\naugmentation: {tint: 0.5}\nobjective: {weights: {name: 0.1}}\n")
    recipe, default = load_recipe(path, ["data.repeat={}"], recipe_class), recipe_class()
    assert recipe.augmentation == default.augmentation.model_copy(update={"tint": 0.5})
    assert recipe.objective.keep_start == default.objective.keep_start
    assert recipe.objective.weights.style == default.objective.weights.style
    assert recipe.data.path == default.data.path and not recipe.data.repeat


@pytest.mark.parametrize("number", ["8e-4", "8.0e-4", "0.0008"])
def test_numbers_with_an_exponent_are_numbers(file, number):
    recipe = load(file, f"training_arguments.learning_rate={number}")
    assert recipe.training_arguments.learning_rate == 0.0008


def test_the_embedded_checkpoint_has_a_name(file):
    assert load(file).encoder == str(LAVIT_EMOJI)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training_arguments.max_steps=abc"], "training_arguments.max_steps: expected a valid integer, got 'abc'"),
        (["training_arguments.learning_rate=.nan"], "training_arguments.learning_rate: expected a finite number"),
        (["training_arguments.learning_rate=nan"], "training_arguments.learning_rate: expected a valid number"),
        (["training_arguments.learning_rate=-1"], "training_arguments.learning_rate: expected greater than or equal"),
        (["training_arguments.max_step=3"], "training_arguments.max_step: unknown key; did you mean max_steps"),
        (["training_arguments.bf16=1"], "training_arguments.bf16: expected a valid boolean, got 1"),
        (["model=3"], "model: expected a valid dictionary"),
        (["model.width=abc"], "model.width: unknown key; known are hidden_size"),
        (["model.hidden_size=abc"], "model.hidden_size: expected a valid integer, got 'abc'"),
        (["model.hiden_size=3"], "model.hiden_size: unknown key; did you mean hidden_size"),
        (["modle.hidden_size=3"], "modle: unknown key; did you mean model"),
        (["mixup.number=3"], "mixup: unknown key; known are stage, data"),
        (["data.validation=2.5"], "data.validation: a share must lie between 0 and 1"),
        (["data.data_files=3"], "data.data_files: expected a valid string or a valid list, got 3"),
        (["early_stopping_patience=3"], "early_stopping_patience needs data.validation"),
        (["objective.quantize_from=2"], "objective.quantize_from: expected less than or equal to 1, got 2"),
        (["encoder.a=3"], "encoder: expected are keys with values, got 'lavit-emoji'"),
        (["model"], "the override 'model' is not of the form key=value"),
        (["model.=3"], "the override 'model.=3' is not of the form key=value"),
        (["threads=!!python/object/apply:os.system [ls]"], "threads: it is no plain YAML: could not determine"),
        (["threads=[[["], "threads: it is no plain YAML"),
    ],
)
def test_a_wrong_override_is_one_line_with_file_and_key(file, overrides, expected):
    with pytest.raises(ValueError) as error:
        load(file, *overrides)
    assert str(error.value).startswith(f"{file}: {expected}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the recipe is empty; expected are keys with values"),
        (b"- 1\n- 2\n", "the recipe is a list"),
        (b"3\n", "the recipe is a int"),
        (b"stage: tokenizer\nencoder: x\n", "data: is missing"),
        (b"stage: tokenizer\ndata: {}\nencoder: x\n", "data.path: is missing; Folder with `metadata.jsonl`"),
        (b"stage: tokenizer\ndata: {path: x}\n", "encoder: is missing; LaVIT checkpoint"),
        (b"stage: !!python/name:os.system\n", "it is no plain YAML: could not determine a constructor"),
        (b"stage: tok\x00enizer\n", "it is no plain YAML"),
        (b"stage: \xff\xfe\n", "it is no plain YAML"),
        (b"stage: tokenizer\nstage: tokenizer\n", "it is no plain YAML: the key 'stage' comes twice"),
        (b"[" * 5000, "it is nested too deeply"),
        (b"stage: 2020-99-99\n", "it is no plain YAML: month must be in 1..12"),
        (b"stage: [tokenizer]\n", "stage: expected one of"),
        (b"data: {path: x}\n", "stage: expected one of"),
    ],
)
def test_a_wrong_file_is_one_line_on_the_command_line(tmp_path, capsys, content, expected):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert lavit(["train", str(tmp_path / "recipe.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lavit: error: {tmp_path}/recipe.yaml: {expected}")


def test_recipes_and_stages_that_are_not_there_are_named(file, capsys):
    assert lavit(["train", "finetun"]) == 2
    assert "there is no recipe finetun: give a YAML file, or one of finetune, paper_" in capsys.readouterr().err
    assert lavit(["train", "language-model", str(file)]) == 2
    assert "stage: expected language-model, got 'tokenizer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either start"),
        ({"start": "x", "language_model": "y"}, "give either start"),
        ({"language_model": "y"}, "language_model needs tokenizer"),
        ({"language_model": "y", "tokenizer": "z", "lora": {}}, "adapters alone cannot learn new visual ids"),
    ],
)
def test_stage_two_needs_a_language_model(values, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelRecipe(data={"path": "x"}, **values)


def sections_of(section: type[Section]):
    """A section and those in it."""
    yield section
    for field in section.model_fields.values():
        if isinstance(field.default, Section):
            yield from sections_of(type(field.default))


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_the_core_is_described(stage):
    for section in sections_of(STAGES[stage].recipe_class):
        fields = section.model_fields.items()
        if issubclass(section, Arguments):
            fields = [(name, field) for name, field in fields if name in Arguments.__annotations__]
        silent = {name for name, field in fields if not field.description and not isinstance(field.default, Section)}
        assert silent <= {"stage"}, section


def test_contradictions_that_transformers_finds_are_one_line(tmp_path, file):
    recipe = load(file, "data.validation=0.1", "training_arguments.eval_strategy=sometimes")
    with pytest.raises(ValueError, match=r"^training_arguments: sometimes is not a valid IntervalStrategy"):
        training_arguments(recipe)


def test_the_recipe_in_the_output_folder_trains_the_same(tmp_path):
    """Also what was set to null where the default is none."""
    write_parts(tmp_path)
    rows = f"{{path: parquet, data_files: {tmp_path / 'rows.parquet'}}}"
    overrides = [f"data={rows}", f"start={tmp_path / 'lavit'}", "lora=null", "early_stopping_patience=null"]
    arguments = "{max_steps: 1, load_best_model_at_end: false, report_to: none, bf16: false, save_total_limit: null}"
    overrides += [f"training_arguments={arguments}", f"training_arguments.output_dir={tmp_path / 'run'}"]
    assert lavit(["train", "finetune", *overrides]) == 0
    path = tmp_path / "run" / "recipe.yaml"
    assert yaml.safe_load(path.read_text())["training_arguments"]["save_total_limit"] is None
    given = load_recipe(RECIPES / "finetune.yaml", overrides, LanguageModelRecipe)
    assert load_recipe(path, [], LanguageModelRecipe) == given
