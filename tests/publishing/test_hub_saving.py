"""Saving: all files of a folder together or none, whatever was there before."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_detokenizer, tiny_model, tiny_processor, tiny_scheduler, tiny_unet, tiny_visual_config

from modeling_lavit import (
    LavitForConditionalGeneration,
    LavitPipeline,
    LavitProcessor,
    LavitVisualTokenizer,
    atomic_lavit,
)
from modeling_lavit.atomic_lavit import replaced_together
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


def tiny_pipeline(seed: int = 0, **overrides) -> LavitPipeline:
    return LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(seed=seed, **overrides),
        detokenizer=tiny_detokenizer(seed=seed),
        unet=tiny_unet(seed=seed, channels=12),
        vae=LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1)),
        scheduler=tiny_scheduler("sample"),
    )


@pytest.fixture(scope="module")
def old() -> LavitPipeline:
    return tiny_pipeline(0)


@pytest.fixture(scope="module")
def new() -> LavitPipeline:
    """Of another width of the decoder, so that its weights do not fit the old configuration."""
    pipe = tiny_pipeline(1)
    pipe.register_modules(detokenizer=tiny_detokenizer(seed=1, intermediate_size=64))
    return pipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder that loads."""
    pipe = LavitPipeline.from_pretrained(folder)
    parts = {"model": pipe.model, "detokenizer": pipe.detokenizer, "unet": pipe.unet}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def of(pipe: LavitPipeline) -> dict[str, torch.Tensor]:
    parts = {"model": pipe.model, "detokenizer": pipe.detokenizer, "unet": pipe.unet}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def test_an_unsharded_save_over_a_sharded_one_leaves_no_shards(old, new, tmp_path):
    old.save_pretrained(tmp_path, max_shard_size="50kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    new.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*-of-*")) and not list(tmp_path.rglob("*.index.json"))
    assert same(weights(tmp_path), of(new))


def test_a_sharded_save_over_an_unsharded_one_is_what_loads(old, new, tmp_path):
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size="50kB")
    assert not (tmp_path / "model.safetensors").exists()
    assert same(weights(tmp_path), of(new))


def test_weights_of_another_variant_stay(old, tmp_path):
    old.save_pretrained(tmp_path, variant="mine")
    old.save_pretrained(tmp_path)
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert {"diffusion_pytorch_model.mine.safetensors", "diffusion_pytorch_model.safetensors"} <= names


def test_what_a_model_has_not_any_more_goes_with_its_weights(tmp_path):
    model = tiny_model()
    model.set_draft_codes([torch.arange(5)])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "draft_codes.safetensors").is_file()
    model.set_draft_codes([])
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "draft_codes.safetensors").exists()


def test_files_of_others_stay(old, new, tmp_path):
    (tmp_path / "notes" / "empty").mkdir(parents=True)
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to("notes/mine.txt")
    for pipe in (old, new):
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "mine"
    assert (tmp_path / "notes" / "empty").is_dir()


def test_parts_are_saved_into_one_folder_one_after_the_other(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert type(LavitProcessor.from_pretrained(tmp_path)) is LavitProcessor
    assert type(LavitForConditionalGeneration.from_pretrained(tmp_path)) is LavitForConditionalGeneration


def test_a_save_that_fails_changes_nothing(old, new, tmp_path, monkeypatch):
    folder = tmp_path / "pipe"
    old.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(type(new.unet), "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new.save_pretrained(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert list(tmp_path.iterdir()) == [folder]


def killed_at(moment: str, count: int, save) -> bool:
    """Runs `save` in a child that is killed at the `count`-th call of a function of the system; whether it was."""
    child = os.fork()
    if child == 0:
        call, calls = getattr(os, moment), []

        def call_or_die(*args, **kwargs):
            calls.append(args)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        setattr(os, moment, call_or_die)
        save()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment, count, is_new", [("mkdir", 3, 0), ("link", 1, 0), ("unlink", 5, 1), ("rmdir", 1, 1)])
def test_a_save_that_is_killed_leaves_the_old_files_or_the_new_ones(old, new, tmp_path, moment, count, is_new):
    folder = tmp_path / "pipe"
    old.save_pretrained(folder)
    (folder / "mine.txt").write_text("mine")
    assert killed_at(moment, count, lambda: new.save_pretrained(folder))
    assert same(weights(folder), of([old, new][is_new]))
    assert (folder / "mine.txt").read_text() == "mine"
    new.save_pretrained(folder)
    assert list(tmp_path.iterdir()) == [folder], "the next save takes away what is left of killed ones"


def test_a_save_that_is_killed_at_any_time_leaves_the_old_files_or_the_new_ones(old, new, tmp_path):
    folder = tmp_path / "pipe"
    old.save_pretrained(folder)
    expected, pipes = [of(old), of(new)], [new, old]
    generator = random.Random(0)
    start = time.monotonic()
    new.save_pretrained(folder)
    takes = time.monotonic() - start
    for number in range(4):
        child = os.fork()
        if child == 0:
            pipes[number % 2].save_pretrained(folder)
            os._exit(0)
        threading.Event().wait(generator.uniform(0, 1.5 * takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = weights(folder)
        assert any(same(found, one) for one in expected)


def test_where_folders_cannot_be_swapped_what_is_half_done_does_not_load(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_lavit, "_swap", lambda one, other: False)
    folder = tmp_path / "pipe"
    expected = [of(old), of(new)]
    for count in (1, 9, 99):
        old.save_pretrained(folder)
        was_killed = killed_at("replace", count, lambda: new.save_pretrained(folder))
        try:
            found = weights(folder)
        except (OSError, ValueError):
            assert was_killed
        else:
            assert any(same(found, one) for one in expected)
    assert same(weights(folder), of(new))


def test_a_folder_that_one_stands_in_stays_the_same_folder(old, new, tmp_path, monkeypatch):
    old.save_pretrained(tmp_path)
    before = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    new.save_pretrained(".")
    assert tmp_path.stat().st_ino == before
    assert same(weights(tmp_path), of(new))


def test_a_folder_in_a_place_that_is_read_only_is_written_inside(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path.parent == tmp_path and not path.exists():
            raise PermissionError("read only")
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    for text in ("one", "two"):
        with replaced_together(folder) as stage:
            assert stage.parent == folder
            (stage / "config.json").write_text(text)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "two"


def test_the_visual_tokenizer_alone_saves_together_too(tmp_path):
    folder = tmp_path / "tokenizer"
    for width in (48, 64):
        tokenizer = LavitVisualTokenizer(tiny_visual_config(intermediate_size=width)).eval()
        tokenizer.save_pretrained(folder, max_shard_size="20kB" if width == 48 else "1GB")
        loaded = LavitVisualTokenizer.from_pretrained(folder)
        assert same(loaded.state_dict(), tokenizer.state_dict())
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "lavit_transformers.LavitVisualTokenizerConfig",
        "AutoModel": "lavit_transformers.LavitVisualTokenizer",
    }
    assert load_file(folder / "model.safetensors").keys() == tokenizer.state_dict().keys()


def test_half_of_the_processes_of_a_distributed_run_write_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not any((tmp_path / "other").glob("*.json"))
