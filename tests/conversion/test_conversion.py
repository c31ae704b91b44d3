"""A converted official checkpoint gives what the reference gave: every recorded output, from the folder it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from modeling_lavit import LavitPipeline
from modeling_lavit.conversion.__main__ import main


E2E = Path(__file__).parents[1] / "fixtures" / "e2e"
EXPECTED = json.loads((E2E / "expected.json").read_text())
CASES = {case["id"]: case for case in EXPECTED["cases"]}
BOI, FIRST_CODE, PAD = (EXPECTED["ids"][name] for name in ("img", "first_code", "pad"))
# names of the reference's arguments
ARGUMENTS = {
    "num_beams": "num_beams",
    "max_length": "max_new_tokens",
    "max_len": "max_new_tokens",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "num_captions": "num_return_sequences",
    "temperature": "temperature",
    "use_nucleus_sampling": "do_sample",
}
# the reference's defaults of `generate_image_tokenids`
IMAGE_ARGUMENTS = {
    "use_nucleus_sampling": ("do_sample", True),
    "guidance_scale": ("guidance_scale", 3.0),
    "max_length": ("max_image_tokens", 200),
    "min_length": ("min_image_tokens", 20),
    "top_p": ("top_p", 0.9),
    "top_k": ("top_k", 50),
    "temperature": ("temperature", 1.0),
    "num_beams": ("num_beams", 1),
    "num_return_images": ("num_return_sequences", 1),
}


def of_task(*tasks: str) -> list:
    return [pytest.param(case, id=name) for name, case in CASES.items() if case["task"] in tasks]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(E2E / "expected.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "lavit"
    assert main([str(E2E / "checkpoint"), str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForMultimodalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipes(folder) -> dict[str, LavitPipeline]:
    pipes = {name: LavitPipeline.from_pretrained(folder, pixel_decoder=name) for name in (None, "lowres")}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return {"highres": pipes[None], "lowres": pipes["lowres"]}


def images(case: dict) -> list[Image.Image]:
    return [Image.open(E2E / "images" / name) for name in case["images"]]


def pixels(processor, case: dict) -> torch.Tensor:
    return processor.image_processor(images(case), reference_compat=True, return_tensors="pt").pixel_values


def strip(row: list[int]) -> list[int]:
    while row and row[-1] == PAD:
        row = row[:-1]
    return row


def check_ids(got: torch.Tensor, case: dict):
    assert [strip(row) for row in got.tolist()] == [strip(row[1:]) for row in case["ids"]]


def seeded(arguments: dict) -> dict:
    seed = arguments.pop("torch_manual_seed_before_call", None)
    return {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}


def test_images_become_the_recorded_pixel_values(processor, tensors):
    case = CASES["preprocess"]
    values = pixels(processor, case)
    recorded = tensors["preprocess.pixel_values_stride14"]
    torch.testing.assert_close(values[..., ::14, ::14], recorded, rtol=0, atol=case["atol"])
    torch.testing.assert_close(values.mean((2, 3)), tensors["preprocess.channel_mean"], rtol=0, atol=1e-4)
    torch.testing.assert_close(values.std((2, 3)), tensors["preprocess.channel_std"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["argmax", "gumbel"])
def test_images_become_the_recorded_visual_tokens(model, processor, tensors, name):
    noise = {"gumbel_noise": tensors["gumbel_noise"]} if name == "gumbel" else {"selection": "argmax"}
    tokens = model.get_image_tokens(pixels(processor, CASES["tokenize"]), **noise)
    assert tokens.lengths.tolist() == tensors[f"tokenize.{name}.counts"].tolist()
    assert (tokens.codes + FIRST_CODE).tolist() == tensors[f"tokenize.{name}.ids"].tolist()


def test_images_are_read_as_the_recorded_features(model, processor, tensors):
    case = CASES["encode_features"]
    with torch.no_grad():
        features = model.get_image_features(pixels(processor, case), selection="argmax").pooler_output
    assert [len(rows) for rows in features] == case["counts"]
    torch.testing.assert_close(torch.cat(features), tensors["encode_features.argmax"], rtol=0, atol=case["atol"])


def test_texts_become_the_ids_of_the_slow_tokenizer(processor):
    case = CASES["text_tokenizer"]
    tokenizer = processor.tokenizer
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in case["texts"]] == case["ids"]
    assert [tokenizer(text).input_ids for text in case["texts"]] == case["ids_with_bos"]
    assert tokenizer.convert_tokens_to_ids(["[IMG]", "[/IMG]"]) == [BOI, BOI + 1]


@pytest.mark.parametrize("case", of_task("caption", "vqa"))
def test_what_is_said_about_images_is_as_recorded(model, processor, tensors, case):
    arguments = dict(case["args"])
    if case["task"] == "caption":
        prompt = arguments.pop("prompt", "")
        texts = [prompt] * len(case["images"]) if isinstance(prompt, str) else prompt
        preset, post_process, recorded = "caption", processor.post_process_caption, case["text"]
    else:
        questions = [case["questions"]] if isinstance(case["questions"], str) else case["questions"]
        template = arguments.pop("prompt", "Question: {} Answer:") or "{}"
        texts = [template.format(question) for question in questions]
        preset, post_process, recorded = "answer", processor.post_process_answer, case["text_before_lemmatisation"]
    # quirk 8: the reference ignores it
    arguments.pop("top_p", None)
    settings = seeded(arguments) | {ARGUMENTS[name]: value for name, value in arguments.items()}
    if case["selector"] == "argmax":
        settings["selection"] = "argmax"
    else:
        settings["gumbel_noise"] = tensors["gumbel_noise"][: len(texts)]

    inputs = processor(images=images(case), text=[f"<image>{text}" for text in texts], reference_compat=True)
    with torch.no_grad():
        expanded = model.model.expand_inputs(
            **inputs, **{name: settings[name] for name in ("selection", "gumbel_noise") if name in settings}
        )
    lengths = expanded.attention_mask.sum(1)
    assert lengths.tolist() == case["attention_mask_sums"]
    if f"{case['id']}.inputs_embeds" in tensors:
        mask = tensors[f"{case['id']}.attention_mask"].bool()
        embeds = tensors[f"{case['id']}.inputs_embeds"][mask]
        got = expanded.inputs_embeds[expanded.attention_mask.bool()]
        torch.testing.assert_close(got, embeds, rtol=0, atol=5e-4)

    ids = model.generate(**inputs, generation_preset=preset, reference_compat=True, **settings)
    new_ids = ids[:, inputs.input_ids.shape[1] :]
    check_ids(new_ids, case)
    assert post_process(new_ids, reference_compat=True) == recorded


@pytest.mark.parametrize("case", of_task("text_to_image_tokens", "multimodal_tokens"))
def test_prompts_become_the_recorded_image_tokens(model, processor, tensors, case):
    arguments = dict(case["args"])
    arguments.pop("is_token_prompt", None)
    settings = seeded(arguments)
    if "uncond_input_ids" in arguments:
        settings["negative_prompt_ids"] = torch.tensor(arguments.pop("uncond_input_ids"))
    assert arguments.keys() <= IMAGE_ARGUMENTS.keys()
    settings |= {name: arguments.get(old, default) for old, (name, default) in IMAGE_ARGUMENTS.items()}
    if case["task"] == "multimodal_tokens":
        image = Image.open(E2E / "images" / case["image"])
        text = f"<image>{case['text']}"
        inputs = processor(images=image, text=text, generation_mode="image", reference_compat=True)
        settings["selection"] = "argmax"
    elif isinstance(case["prompts"][0], str):
        inputs = processor(text=case["prompts"], generation_mode="image", reference_compat=True)
    else:
        rows = {"input_ids": [[*row, BOI] for row in case["prompts"]]}
        inputs = processor.tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    output = model.generate(
        **inputs,
        generation_mode="image",
        reference_compat=True,
        return_dict_in_generate=True,
        output_logits="cfg_trace" in case,
        **settings,
    )
    check_ids(output.sequences, case)
    for step in range(4 if "cfg_trace" in case else 0):
        name = f"{case['id']}.step{step}"
        conditional, unconditional = output.logits[step].log_softmax(-1).chunk(2)
        combined = unconditional + settings["guidance_scale"] * (conditional - unconditional)
        for kind, got in (("cond", conditional), ("uncond", unconditional)):
            torch.testing.assert_close(got, tensors[f"{name}.{kind}"].log_softmax(-1), rtol=0, atol=2e-3)
        torch.testing.assert_close(combined, tensors[f"{name}.combined"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("case", of_task("pixel_decode"))
def test_visual_tokens_become_the_recorded_images(pipes, tensors, case, monkeypatch):
    name, pipe = case["id"], pipes[case["variant"]]
    noise, latents = [], []
    step = type(pipe.scheduler).step

    def recording_step(scheduler, model_output, *args, **kwargs):
        noise.append(model_output)
        return step(scheduler, model_output, *args, **kwargs)

    def record_latents(pipe, index, timestep, kwargs):
        latents.append(kwargs["latents"])
        timesteps.append(int(timestep))
        return kwargs

    timesteps = []
    # of the class: each call has a scheduler of its own
    monkeypatch.setattr(type(pipe.scheduler), "step", recording_step)
    monkeypatch.setattr(pipe, "safety_checker", None)
    settings = {
        "height": case["height"],
        "width": case["width"],
        "num_inference_steps": case["num_inference_steps"],
        "decoder_guidance_scale": case["guidance_scale"],
        "latents": tensors[f"{name}.latents_in"],
        "original_size": tuple(case["original_size"]) if "original_size" in case else None,
        "crops_coords_top_left": tuple(case.get("crops", (0, 0))),
        "output_type": "np",
        "callback_on_step_end": record_latents,
    }
    language_model = {"reference_compat": True, "do_sample": False}
    for old, value in case.get("llm_args", {}).items():
        language_model[IMAGE_ARGUMENTS[old][0]] = False if old == "use_nucleus_sampling" else value
    if "multimodal_prompt" in case:
        prompt = [
            Image.open(E2E / "images" / part) if kind == "image" else part for part, kind in case["multimodal_prompt"]
        ]
        output = pipe(prompt, selection="argmax", **language_model, **settings)
    elif "prompts" in case:
        output = pipe(case["prompts"], **language_model, **settings)
    elif "images" in case:
        output = pipe.reconstruct(images(case), selection="argmax", reference_compat=True, **settings)
    else:
        codes = [torch.tensor([i - FIRST_CODE for i in row if i >= FIRST_CODE]) for row in case["tokens_used"]]
        output = pipe(visual_tokens=codes, **settings)
    if case["tokens_used"]:
        recorded = [[i - FIRST_CODE for i in row if i >= FIRST_CODE] for row in case["tokens_used"]]
        assert [codes.tolist() for codes in output.visual_tokens.split()] == recorded

    assert timesteps == case["timesteps"]
    with torch.no_grad():
        conditions, _ = pipe.encode_visual_tokens(output.visual_tokens)
    embeds = conditions["prompt_embeds"][:, :8]
    torch.testing.assert_close(embeds, tensors[f"{name}.cond_rows0_7"], rtol=0, atol=5e-4)
    if case["variant"] == "highres":
        pooled = conditions["pooled_prompt_embeds"]
        torch.testing.assert_close(pooled, tensors[f"{name}.pooled"], rtol=0, atol=5e-4)
    torch.testing.assert_close(noise[0], tensors[f"{name}.first_guided_noise"], rtol=0, atol=5e-4)
    for index in (0, 4, len(timesteps) - 1):
        recorded = tensors[f"{name}.latents_after_step{index}"]
        torch.testing.assert_close(latents[index], recorded, rtol=1e-4, atol=1e-3)
    if f"{name}.image_float" in tensors:
        recorded = tensors[f"{name}.image_float"].numpy()
        np.testing.assert_allclose(output.images, recorded, rtol=0, atol=case["atol_image_float"])
    uint8 = np.rint(output.images * 255).astype(int)
    assert np.abs(uint8 - tensors[f"{name}.image_uint8"].numpy().astype(int)).max() <= 1


def test_the_safety_checker_flags_what_it_flagged(pipes, tensors):
    case = CASES["safety"]
    images = tensors["safety.images_in"].permute(0, 3, 1, 2)
    for pipe in pipes.values():
        checked, flags = pipe.run_safety_checker(images * 2 - 1)
        assert flags == case["has_nsfw_concept"]
        assert [bool((image == -1).all()) for image in checked] == case["black"]
    pil = pipe.image_processor.numpy_to_pil(tensors["safety.images_in"].numpy())
    values = pipe.feature_extractor(pil, return_tensors="pt").pixel_values
    recorded = tensors["safety.clip_pixel_values_stride16"]
    torch.testing.assert_close(values[..., ::16, ::16], recorded, rtol=0, atol=0.02)
    with torch.no_grad():
        pooled = pipe.safety_checker.vision_model(values)[1]
        embeds = pipe.safety_checker.visual_projection(pooled)
    torch.testing.assert_close(embeds, tensors["safety.image_embeds"], rtol=0, atol=case["atol"])


def test_every_recorded_task_is_tested():
    tasks = {"preprocess", "tokenize_image", "encode_features", "text_tokenizer", "safety_checker", "caption", "vqa"}
    tasks |= {"text_to_image_tokens", "multimodal_tokens", "pixel_decode"}
    assert {case["task"] for case in CASES.values()} == tasks
