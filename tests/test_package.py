"""The package from outside: registration, the wheel, a plain checkout, and what README and Makefile promise."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from tiny import tiny_config
from transformers.pipelines import PIPELINE_REGISTRY

import modeling_lavit
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.compat_lavit import ALLOWED_VERSIONS, check_versions


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, to build in and to run from."""
    copy = tmp_path_factory.mktemp("copy") / "lavit-hf.x"
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "data", "runs", "outputs", "tests", "*.safetensors"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout) -> zipfile.ZipFile:
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"]
    subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    (path,) = (checkout / "wheels").glob("*.whl")
    return zipfile.ZipFile(path)


def run_python(code: str, folder: Path) -> str:
    """What `code` prints in `folder`, the first place where imports are looked for."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_exist():
    assert all(hasattr(modeling_lavit, name) for name in modeling_lavit.__all__)


def test_the_auto_classes_know_the_models_and_the_task():
    config = tiny_config()
    assert type(transformers.AutoConfig.for_model("lavit")) is modeling_lavit.LavitConfig
    expected = {
        "AutoModel": modeling_lavit.LavitModel,
        "AutoModelForCausalLM": modeling_lavit.LavitForConditionalGeneration,
        "AutoModelForImageTextToText": modeling_lavit.LavitForConditionalGeneration,
        "AutoModelForMultimodalLM": modeling_lavit.LavitForConditionalGeneration,
    }
    for auto_class, model_class in expected.items():
        assert type(getattr(transformers, auto_class).from_config(config)) is model_class
    assert type(transformers.AutoModel.from_config(config.visual_config)) is modeling_lavit.LavitVisualTokenizer
    task = PIPELINE_REGISTRY.check_task("text-to-image")[1]
    assert task["impl"] is modeling_lavit.LavitTextToImagePipeline


def test_the_wheel_has_one_import_name_and_everything_it_needs(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("lavit_hf-")} == {"modeling_lavit"}
    expected = [
        "modeling_lavit/command_line/main.py",
        "modeling_lavit/model_card.md",
        "modeling_lavit/py.typed",
        "modeling_lavit/processing/processing_lavit.py",
        "modeling_lavit/conversion/__init__.py",
        "modeling_lavit/training/run.py",
        "modeling_lavit/training/recipes/finetune.yaml",
        "modeling_lavit/training/emoji/recipes/tokenizer.yaml",
        "modeling_lavit/evaluation/emoji/report.py",
        "modeling_lavit/checkpoints/__init__.py",
        "modeling_lavit/checkpoints/lavit-emoji/NOTICE",
    ]
    assert [name for name in expected if name not in names] == []
    assert any(re.fullmatch(r"lavit_hf-[^/]*\.data/scripts/lavit", name) for name in names)
    shipped = {path.relative_to(LAVIT_EMOJI).as_posix() for path in LAVIT_EMOJI.rglob("*") if path.is_file()}
    prefix = "modeling_lavit/checkpoints/lavit-emoji/"
    packed = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert packed == {name for name in shipped if not name.endswith((".safetensors", ".pyc"))}


def test_every_folder_of_code_is_a_package():
    folders = ("modeling_lavit", "processing", "conversion", "training", "evaluation")
    with_code = {path.parent for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in with_code if not (folder / "__init__.py").is_file()] == []


def test_other_versions_of_the_libraries_are_named_in_one_sentence():
    check_versions({"torch": ">=2", "no_such_library": "<1"})
    with pytest.raises(
        ImportError, match=r"^LaVIT works with torch<1, and 2\.[^:]* is installed: pip install 'torch<1'$"
    ):
        check_versions({"torch": "<1"})


def test_setup_and_code_allow_the_same_versions(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: (\w+)([<>=][^;\s]*)$", wheel.read(metadata).decode(), re.M)
    ranges = {name: SpecifierSet(versions) for name, versions in required}
    assert {name: ranges[name] for name in ALLOWED_VERSIONS} == {
        name: SpecifierSet(versions) for name, versions in ALLOWED_VERSIONS.items()
    }


def test_name_and_version_are_the_same_everywhere(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    assert "Name: lavit-hf" in lines and f"Version: {modeling_lavit.__version__}" in lines
    assert f"## {modeling_lavit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


USE = """
import modeling_lavit
from modeling_lavit import conversion, evaluation, processing, training
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.publishing.card import template
assert "## Use" in template() and (LAVIT_EMOJI / "NOTICE").is_file()
for module in (modeling_lavit, processing, training, evaluation):
    print(module.__file__)
"""


@pytest.mark.slow
def test_the_wheel_works_where_a_user_has_a_file_called_processing(wheel, tmp_path):
    wheel.extractall(tmp_path)
    (tmp_path / "processing.py").write_text("raise RuntimeError('this is not yours')")
    files = run_python(USE, tmp_path).split()
    assert all(file.startswith(str(tmp_path / "modeling_lavit")) for file in files)


@pytest.mark.slow
def test_a_checkout_works_without_being_installed(checkout):
    files = run_python(USE, checkout).split()
    assert [Path(file).parent.name for file in files] == ["modeling_lavit", "processing", "training", "evaluation"]
    assert all(file.startswith(str(checkout)) for file in files)


def test_constraints_pin_every_direct_dependency(wheel):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    needed = {
        re.match(r"[\w-]+", line.removeprefix("Requires-Dist: "))[0].lower().replace("_", "-")
        for line in wheel.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and not line.startswith("Requires-Dist: lavit-hf")
    }
    assert needed and needed - pinned == set()
    assert "torch==2.13.*" in lines


READ = """
import sys
from PIL import Image
from modeling_lavit import LavitForConditionalGeneration, LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI

model = LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI).eval()
processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
model.generate(**processor(images=Image.new("RGB", (64, 64), "red")), generation_preset="caption")
print(sorted(name for name in sys.modules if name.split(".")[0] == "diffusers"))
"""

DRAW = """
import pickle, sys
{first}
import diffusers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import pipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI

assert diffusers.LavitPipeline is modeling_lavit.LavitPipeline
assert diffusers.LavitPatchAutoencoder.__module__ == "modeling_lavit.small_decoder_lavit"
for auto in (DiffusionPipeline, AutoPipelineForText2Image):
    assert type(auto.from_pretrained(LAVIT_EMOJI)) is modeling_lavit.LavitPipeline
assert type(pipeline("text-to-image", model=str(LAVIT_EMOJI)).decoder) is modeling_lavit.LavitPipeline
assert pickle.loads(pickle.dumps(modeling_lavit.LavitPipeline)) is modeling_lavit.LavitPipeline
assert not hasattr(diffusers, "LavitNothing") and not hasattr(modeling_lavit, "LavitNothing")
from modeling_lavit import *
print(LavitUNet2DConditionModel.__name__, set(modeling_lavit.__all__) <= set(dir(modeling_lavit)))
"""


def test_reading_an_image_imports_no_diffusers():
    assert run_python(READ, ROOT).splitlines()[-1] == "[]"


@pytest.mark.parametrize("first", ["import modeling_lavit", "import diffusers, modeling_lavit"])
def test_diffusers_finds_the_classes_whichever_is_imported_first(first):
    assert run_python(DRAW.format(first=first), ROOT).splitlines()[-1] == "LavitUNet2DConditionModel True"
