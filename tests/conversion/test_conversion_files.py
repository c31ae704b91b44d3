"""Conversion: every weight has its place at full size, all kinds of files are read, faults leave nothing behind."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoTokenizer

from benchmarks import official_checkpoint
from modeling_lavit import (
    LavitConfig,
    LavitDetokenizer,
    LavitDetokenizerConfig,
    LavitForConditionalGeneration,
    LavitPipeline,
    LavitVisualTokenizer,
)
from modeling_lavit.conversion import keys, writing
from modeling_lavit.conversion.__main__ import main
from modeling_lavit.conversion.text_tokenizer import (
    build_tokenizer,
    merges_of,
    parse_sentencepiece,
)


CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "e2e" / "checkpoint"


def on_meta(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "shapes, tensors, parameters",
    [
        (official_checkpoint.vision_tower(), 528, 1_012_588_928),
        (official_checkpoint.visual_tokenizer(), 285, 409_819_394),
        (official_checkpoint.decoder("lowres"), 276, 404_081_792),
        (official_checkpoint.decoder("highres"), 287, 414_002_304),
    ],
)
def test_official_tables_have_the_published_number_of_tensors_and_parameters(shapes, tensors, parameters):
    assert len(shapes) == tensors
    assert sum(tensor.numel() for tensor in on_meta(shapes).values()) == parameters


def test_full_size_weights_are_exactly_those_of_the_model():
    with torch.device("meta"):
        model = LavitForConditionalGeneration(LavitConfig())
    tokenizer = on_meta(official_checkpoint.visual_tokenizer())
    tower = {f"encoder.{name}": tensor for name, tensor in on_meta(official_checkpoint.vision_tower()).items()}
    tower, left_out = keys.drop_known_extras(tower)
    assert left_out.keys() == {"encoder.head.weight", "encoder.head.bias"}
    language_model, left_out = keys.drop_known_extras(on_meta(official_checkpoint.language_model()))
    assert len(left_out) == 32
    assert all(keys.is_visual(name) for name in tokenizer | tower)
    named = set(map(keys.official_name, model.state_dict()))
    for name in tokenizer | tower | language_model:
        assert name.removeprefix("encoder.") in named or name.endswith(("q_bias", "v_bias")), name
    converted = keys.rename_language_model(language_model)
    for name, tensor in keys.rename_tokenizer(tokenizer | tower).items():
        if name.startswith("vit_proj."):
            converted[name.replace("vit_proj", "model.understanding.projection")] = tensor
            continue
        converted[f"model.visual_tokenizer.{name}"] = tensor
        if name.startswith("merger."):
            converted[f"model.understanding.{name}"] = tensor
    assert shapes_of(converted) == shapes_of(model.state_dict())


@pytest.mark.parametrize("variant", ["highres", "lowres"])
def test_full_size_decoder_weights_are_exactly_those_of_the_detokenizer(variant):
    dims = {"highres": [768, 1280], "lowres": [768]}[variant]
    with torch.device("meta"):
        detokenizer = LavitDetokenizer(LavitDetokenizerConfig(variant=variant, prompt_embed_dims=dims))
    converted = shapes_of(keys.rename_detokenizer(on_meta(official_checkpoint.decoder(variant))))
    converted["codebook.weight"] = (16384, 32)
    if variant == "lowres":
        converted["unconditional_embedding"] = (77, 768)
    assert converted == shapes_of(detokenizer.state_dict())


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "official"))


def change(path: Path, **tensors):
    """Replaces tensors of a .bin file, or removes those that are None; `__` in names stands for a dot."""
    content = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    torch.save(content, path)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("pickle-has-run",)


def edit(path: Path, **values):
    """Replaces entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def name_file(index: Path, name):
    """Has an index name another file for its first weight."""
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {next(iter(weight_map)): name})


def compress(path: Path):
    """Zips a .bin file again, as a user's archive tool would."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


TOKENIZER, READING = "visual_tokenizer/tokenizer_encoder.bin", "language_model/visual_weight.bin"
SHARD = "language_model/pytorch_model-00002-of-00004.bin"
NORM = "model__layers__0__input_layernorm__weight"
INDEX, LLAMA = "language_model/pytorch_model.bin.index.json", "language_model/config.json"
UNET = "highres_pixel_decoding/unet/config.json"
BIAS = "token_predictor__in_conv__0__bias"
FAULTS = {
    "truncated shard": (lambda c: truncate(c / SHARD), "pytorch_model-00002-of-00004.bin is truncated"),
    "truncated visual tokenizer": (lambda c: truncate(c / TOKENIZER), "tokenizer_encoder.bin is truncated"),
    "truncated text tokenizer": (lambda c: truncate(c / "language_model/tokenizer.model"), "tokenizer.model"),
    "damaged config": (lambda c: truncate(c / "highres_pixel_decoding/unet/config.json"), "config.json"),
    "missing shard": (lambda c: (c / SHARD).unlink(), "names files that are missing"),
    "missing vision tower": (
        lambda c: (c / "visual_tokenizer/eva_vitg_psz14.bin").unlink(),
        "eva_vitg_psz14.bin is m",
    ),
    "missing text tokenizer": (
        lambda c: (c / "language_model/tokenizer.model").unlink(),
        "tokenizer.model is missing",
    ),
    "missing language model": (lambda c: shutil.rmtree(c / "language_model"), "is missing"),
    "missing unet": (lambda c: shutil.rmtree(c / "highres_pixel_decoding/unet"), "unet/config.json is missing"),
    "missing conditions": (lambda c: (c / "pixel_decoding/uncond_embeddings.bin").unlink(), "uncond_embeddings"),
    "missing key": (
        lambda c: change(c / TOKENIZER, token_predictor__in_conv__0__bias=None),
        "missing: token_predictor.in_conv.0.bias",
    ),
    "missing half of a bias": (
        lambda c: change(c / "visual_tokenizer/eva_vitg_psz14.bin", blocks__1__attn__v_bias=None),
        "blocks.1.attn.q_bias and v_bias",
    ),
    "missing key of a shard": (lambda c: change(c / SHARD, **{NORM: None}), "which the index promises"),
    "extra key": (lambda c: change(c / TOKENIZER, quantize__usage=torch.ones(2)), "quantize.usage"),
    "extra key of a shard": (lambda c: change(c / SHARD, more=torch.ones(2)), "which the index does not name"),
    "extra key of the decoder": (
        lambda c: change(c / "visual_tokenizer/highres_tokenizer_decoder.bin", more=torch.ones(2)),
        "highres decoder: nothing in the model takes the weights more",
    ),
    "wrong shape": (lambda c: change(c / SHARD, **{NORM: torch.ones(65)}), "input_layernorm.weight (65,), not (64,)"),
    "other selector for reading": (
        lambda c: change(c / READING, token_predictor__in_conv__0__bias=torch.ones(48)),
        "token_predictor.in_conv.0.bias than the visual tokenizer",
    ),
    "no tensors": (lambda c: change(c / TOKENIZER, epoch=3), "'epoch'"),
    "a list": (lambda c: torch.save([1], c / TOKENIZER), "holds a list: not a state dict"),
    "a weight without a name": (lambda c: torch.save({3: torch.ones(2)}, c / TOKENIZER), "3, which are no tensors"),
    "a sparse weight": (
        lambda c: change(c / TOKENIZER, more=torch.eye(2).to_sparse()),
        "'more', which are no tensors",
    ),
    "a weight that is not a number": (
        lambda c: change(c / TOKENIZER, **{BIAS: torch.full((48,), float("nan"))}),
        "token_predictor.in_conv.0.bias holds NaN",
    ),
    "an infinite weight": (
        lambda c: change(c / SHARD, **{NORM: torch.full((64,), float("inf"))}),
        "model.layers.0.input_layernorm.weight holds NaN or infinite",
    ),
    "JSON of a list": (lambda c: (c / LLAMA).write_text("[1]"), "must hold a JSON object, not list"),
    "JSON of nothing": (lambda c: (c / UNET).write_text("null"), "must hold a JSON object, not NoneType"),
    "deep JSON": (lambda c: (c / LLAMA).write_text('{"a":' * 100_000), "nested too deeply"),
    "ill-typed JSON": (lambda c: edit(c / LLAMA, hidden_size="wide"), "Field 'hidden_size' expected int"),
    "no map of weights": (lambda c: edit(c / INDEX, weight_map=[1]), "is no index of weights"),
    "a weight without a file": (lambda c: name_file(c / INDEX, 3), "is no index of weights"),
    "a file outside": (lambda c: name_file(c / INDEX, f"../{TOKENIZER}"), "must lie beside the index"),
    "a file far outside": (lambda c: name_file(c / INDEX, "/etc/passwd"), "must lie beside the index"),
    "a licence from elsewhere": (lambda c: (c / "LICENSE").symlink_to("/etc/passwd"), "LICENSE is a link"),
    "a hundred thousand layers": (lambda c: edit(c / LLAMA, num_hidden_layers=100_000), "num_hidden_layers=100000"),
    "a hundred thousand blocks": (lambda c: edit(c / UNET, layers_per_block=100_000), "layers_per_block=100000"),
    "a width of a billion": (lambda c: edit(c / LLAMA, hidden_size=10**9), "(642, 64), not (642, 1000000000)"),
    "another architecture": (
        lambda c: (c / LLAMA).write_text('{"model_type": "mamba"}'),
        "describes no language model",
    ),
    "a configuration that runs code": (
        lambda c: edit(c / LLAMA, model_type="x", auto_map={"AutoConfig": "evil.C"}),
        "asks to run code",
    ),
    "a pointer in place of weights": (
        lambda c: (c / TOKENIZER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "truncated or damaged",
    ),
    "pickle that runs code": (lambda c: torch.save(RunsCode(), c / TOKENIZER), "asks to run code"),
    "old pickle that runs code": (
        lambda c: (c / TOKENIZER).write_bytes(pickle.dumps(RunsCode())),
        "tokenizer_encoder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_line_and_no_folder(checkpoint, tmp_path, fault, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    break_it, message = FAULTS[fault]
    break_it(checkpoint)
    capfd.readouterr()
    assert main([str(checkpoint), str(tmp_path / "out")]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lavit convert: error:")]
    assert len(lines) == 1 and message in lines[0], lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, capfd, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**6, 10**6))
    assert main([str(CHECKPOINT), str(tmp_path / "out")]) == 2
    assert "no space left" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_no_folder(tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        code = main([str(CHECKPOINT), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "could not be written, is the disk full?" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    output = tmp_path / "out"
    child = os.fork()
    if child == 0:
        save, calls = writing.save_file, []

        def save_some(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args, **kwargs)

        writing.save_file = save_some
        main([str(CHECKPOINT), str(output)])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".out.saving-") and f"-{child}-" in left[0].name
    assert (left[0] / "model.safetensors").is_file()
    assert main([str(CHECKPOINT), str(output)]) == 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_already_there_stays_as_it_is(tmp_path, capfd, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        output.write_text("mine")
    assert main([str(CHECKPOINT), str(output)]) == 2
    assert ("not empty" if kind == "folder" else "is a file") in capfd.readouterr().err
    assert (output / "mine" if kind == "folder" else output).read_text() == "mine"


def test_wrong_arguments_are_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        main([str(CHECKPOINT), str(tmp_path / "out"), "--dtype", "int8"])
    assert stop.value.code == 2
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "there is no directory" in capfd.readouterr().err
    assert main([str(CHECKPOINT), str(tmp_path / "out"), "--heads", "5"]) == 2
    assert "5 attention heads do not divide the width 48" in capfd.readouterr().err


def test_a_compressed_archive_is_read_right(checkpoint, tmp_path):
    for file in (SHARD, TOKENIZER):
        compress(checkpoint / file)
    none = ["--pixel-decoder", "none"]
    for source, output in ((CHECKPOINT, "plain"), (checkpoint, "compressed")):
        assert main([str(source), str(tmp_path / output), *none]) == 0
    plain, compressed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compressed"))
    assert plain.keys() == compressed.keys()
    assert all(torch.equal(plain[name], compressed[name]) for name in plain)


def test_values_beyond_the_written_type_are_an_error_that_says_so(checkpoint, tmp_path, capfd):
    change(checkpoint / SHARD, **{NORM: torch.full((64,), 1e6)})
    assert main([str(checkpoint), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "input_layernorm.weight has values that torch.float16 cannot hold" in capfd.readouterr().err


def test_a_licence_that_the_cache_links_to_is_copied(tmp_path):
    snapshot = tmp_path / "snapshots" / "0123"
    shutil.copytree(CHECKPOINT, snapshot)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("LaVIT Community License")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    assert main([str(snapshot), str(tmp_path / "out"), "--pixel-decoder", "none"]) == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "LaVIT Community License"


def test_unknown_keys_are_left_out_on_request_and_named(checkpoint, tmp_path, capfd):
    change(checkpoint / TOKENIZER, quantize__usage=torch.ones(2))
    arguments = [str(checkpoint), str(tmp_path / "out"), "--pixel-decoder", "none", "--ignore-extra-keys"]
    assert main(arguments) == 0
    assert "tokenizer_encoder.bin: left out quantize.usage: unknown" in capfd.readouterr().out


def test_safetensors_shards_and_half_precision_give_the_same_model_rounded(checkpoint, tmp_path, monkeypatch):
    for folder, names in {"visual_tokenizer": ["*.bin"], "language_model": ["visual_weight.bin"]}.items():
        for name in names:
            for path in (checkpoint / folder).glob(name):
                save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
                path.unlink()
    monkeypatch.setattr(writing, "SHARD_BYTES", 400_000)
    whole, half = tmp_path / "whole", tmp_path / "half"
    none = ["--pixel-decoder", "none"]
    assert main([str(CHECKPOINT), str(whole), *none]) == 0
    safetensors = ["--language-model", "language_model_safetensors", "--dtype", "bfloat16"]
    assert main([str(checkpoint), str(half), *none, *safetensors]) == 0
    assert len(list(half.glob("model-*-of-*.safetensors"))) > 2
    single = AutoModelForMultimodalLM.from_pretrained(whole).state_dict()
    rounded = AutoModelForMultimodalLM.from_pretrained(half)
    assert rounded.dtype == torch.bfloat16
    assert not (half / "model_index.json").exists()
    for name, tensor in rounded.state_dict().items():
        # the visual side's norms compute in float32, on rounded weights
        in_float32 = any(part in name for part in LavitVisualTokenizer._keep_in_fp32_modules_strict)
        assert tensor.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
        expected = single[name] if "codebook" in name else single[name].to(torch.bfloat16)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_equal_mergers_are_stored_once(checkpoint, tmp_path):
    tokenizer = torch.load(checkpoint / TOKENIZER, weights_only=True)
    reading = torch.load(checkpoint / READING, weights_only=True)
    torch.save({name: tokenizer.get(name, tensor) for name, tensor in reading.items()}, checkpoint / READING)
    assert main([str(checkpoint), str(tmp_path / "out"), "--pixel-decoder", "none"]) == 0
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    assert model.config.share_understanding_merger and model.model.understanding.merger is None
    assert torch.equal(model.model.understanding.projection.weight, reading["vit_proj.weight"])


def test_the_first_release_draws_with_the_small_decoder(checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "highres_pixel_decoding")
    (checkpoint / "visual_tokenizer" / "highres_tokenizer_decoder.bin").unlink()
    (checkpoint / "LICENSE").write_text("LaVIT Community License")
    vae = checkpoint / "pixel_decoding" / "vae" / "diffusion_pytorch_model.bin"
    weights, old = torch.load(vae, weights_only=True), {}
    for name, tensor in weights.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        old[name] = tensor
    assert old.keys() != weights.keys()
    torch.save(old, vae, _use_new_zipfile_serialization=False)
    assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    pipe = LavitPipeline.from_pretrained(tmp_path / "out")
    assert pipe.detokenizer.config.variant == "lowres" and pipe.unet.config.cross_attention_dim == 32
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.vae.state_dict().items())
    assert (tmp_path / "out" / "LICENSE").read_text() == "LaVIT Community License"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "rain1011/LaVIT-7B" and card.data.license == "other"


def test_the_folder_is_what_the_pipeline_saves_and_its_card_names_the_licence(tmp_path):
    output, again = tmp_path / "out", tmp_path / "again"
    assert main([str(CHECKPOINT), str(output), "--pixel-decoder", "highres"]) == 0
    pipe = LavitPipeline.from_pretrained(output)
    pipe.save_pretrained(again)
    assert files_of(output) == files_of(again)
    for name in files_of(output):
        if name.endswith(".safetensors"):
            before, after = load_file(output / name), load_file(again / name)
            assert before.keys() == after.keys(), name
            assert all(torch.equal(before[key], after[key]) for key in before), name
        elif name.endswith(".json") and name != "tokenizer_config.json":
            before, after = (json.loads((folder / name).read_text()) for folder in (output, again))
            # diffusers notes where a component was loaded from
            after.pop("_name_or_path", None)
            assert before == after, name
    card = ModelCard.load(output / "README.md")
    assert card.data.license_name == "lavit-community-license" and card.data.base_model == "rain1011/LaVIT-7B-v2"
    for text in ("LaVIT Community License", "64 × 64 pixels", "pipe.reconstruct", "0.5 M"):
        assert text in card.text, text


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sentencepiece_model():
    return parse_sentencepiece((CHECKPOINT / "language_model" / "tokenizer.model").read_bytes())


def test_text_behind_a_special_token_begins_with_a_space_in_legacy_mode_alone():
    legacy, new = (build_tokenizer(sentencepiece_model(), legacy, add_bos_token=False) for legacy in (True, False))
    for text in ("a photo", " a", "▁a", "  a\n", "", "北"):
        assert legacy.encode(text).ids == new.encode(text).ids, text
    assert legacy.encode("a</s>a").tokens == ["▁a", "</s>", "▁a"]
    assert new.encode("a</s>a").tokens == ["▁a", "</s>", "a"]
    assert new.encode("</s>a").tokens == ["</s>", "a"]


def test_merges_follow_the_order_of_the_text_where_pairs_overlap():
    pieces = [("a", -9.0), ("b", -9.0), ("ab", -1.0), ("ba", -2.0), ("aba", -3.0)]
    assert merges_of(pieces)[2:] == [("ab", "a"), ("a", "ba")]
    pieces = [("a", -9.0), ("aa", -1.0), ("aaa", -2.0)]
    assert merges_of(pieces) == [("a", "a"), ("aa", "a"), ("a", "aa")]


def random_text(generator: random.Random, pieces: list[str]) -> str:
    def character() -> str:
        ranges = [(0, 127), (0, 0x2FFF), (0, 0xD7FF), (0xE000, 0x10FFFF)]
        return chr(generator.randint(*generator.choice(ranges)))

    def word() -> str:
        return generator.choice(pieces).replace("▁", generator.choice(" ▁"))

    draw = generator.choice([character, word, lambda: generator.choice("ab  \n.-=")])
    return "".join(draw() for _ in range(generator.randint(0, 30)))


def test_random_texts_become_the_ids_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece, to compare with, is not installed")
    file = CHECKPOINT / "language_model" / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert main([str(CHECKPOINT), str(tmp_path / "out"), "--pixel-decoder", "none"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    new = build_tokenizer(sentencepiece_model(), legacy=False, add_bos_token=False)
    pieces = [piece.piece for piece in sentencepiece_model().pieces if piece.type == 1]
    generator = random.Random(0)
    for text in (random_text(generator, pieces) for _ in range(10_000)):
        ids = reference.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert new.encode(text, add_special_tokens=False).ids == ids, repr(text)
