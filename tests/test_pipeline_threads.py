"""One LavitPipeline in several threads, in copies and in other processes."""

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from peft import LoraConfig
from tiny import an_image, codes, latents_of, seeded, tiny_pipeline, tiny_scheduler


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


# settings that schedules, conditions and guidance differ by
CALLS = [
    {
        "prompt": ["a red apple", "two blue cats", [an_image(), "in snow"], "dogs"][i % 4],
        "num_inference_steps": 2 + i % 3,
        "decoder_guidance_scale": [1.0, 3.0][i % 2],
        "decoder_guidance_interval": [(0.0, 1.0), (0.3, 0.8)][i // 2 % 2],
        "max_image_tokens": 5 + i % 3,
    }
    for i in range(32)
]


@pytest.mark.parametrize(("scheduler", "count"), [(DDIMScheduler, 32), (PNDMScheduler, 8)])
def test_eight_threads_draw_what_each_draws_alone(scheduler, count):
    pipe = tiny_pipeline(scheduler=scheduler.from_config(tiny_scheduler().config, skip_prk_steps=True))

    def draw(i: int) -> torch.Tensor:
        return latents_of(pipe, generator=seeded(i), **CALLS[i])

    alone = [draw(i) for i in range(count)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(count)))
    assert [torch.equal(*pair) for pair in zip(alone, together, strict=True)] == [True] * count


def test_threads_with_lora_scales_of_their_own_draw_what_each_draws_alone():
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def draw(i: int) -> torch.Tensor:
        scale = {"scale": i / 4}
        return latents_of(pipe, visual_tokens=codes(4), generator=seeded(0), cross_attention_kwargs=scale)

    alone = [draw(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[7])


def test_threads_of_an_offloaded_pipeline_draw_what_each_draws_alone():
    pipe = tiny_pipeline()
    alone = [latents_of(pipe, visual_tokens=codes(3 + i), generator=seeded(i)) for i in range(6)]
    pipe.enable_model_cpu_offload(device="cpu")
    with ThreadPoolExecutor(6) as pool:
        together = list(
            pool.map(lambda i: latents_of(pipe, visual_tokens=codes(3 + i), generator=seeded(i)), range(6))
        )
    for each in zip(alone, together, strict=True):
        torch.testing.assert_close(*each)


def test_each_thread_reads_its_own_call_from_the_pipeline_while_its_callback_runs(pipe):
    barrier, seen = threading.Barrier(2, timeout=60), {}

    def draw(steps: int):
        def watch(denoiser, step, timestep, tensors):
            if step == 0:
                barrier.wait()
                seen[steps] = (pipe.num_timesteps, pipe.guidance_scale, pipe.interrupt)
                assert (denoiser.num_timesteps, denoiser.guidance_scale) == seen[steps][:2]
                barrier.wait()
            return {}

        pipe(
            visual_tokens=codes(4),
            num_inference_steps=steps,
            decoder_guidance_scale=float(steps),
            callback_on_step_end=watch,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, (2, 3)))
    assert seen == {2: (2, 2.0, False), 3: (3, 3.0, False)}


def test_what_a_callback_is_given_has_the_components_of_the_pipeline(pipe):
    found = []

    def watch(denoiser, step, timestep, tensors):
        found.append(denoiser.model is pipe.model and denoiser.processor is pipe.processor)
        found.append(denoiser.scheduler is not pipe.scheduler and len(denoiser.scheduler.timesteps) == 2)
        return {}

    pipe(visual_tokens=codes(4), num_inference_steps=2, callback_on_step_end=watch)
    assert found == [True] * 4


def test_interrupt_set_on_the_pipeline_in_a_callback_stops_that_call_alone(pipe):
    steps = []

    def stop(denoiser, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return {}

    stopped = latents_of(pipe, visual_tokens=codes(4), num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0] and pipe.interrupt and torch.isfinite(stopped).all()
    pipe(visual_tokens=codes(4), num_inference_steps=2)
    assert not pipe.interrupt and pipe.num_timesteps == 2


def test_interrupt_while_the_visual_tokens_are_written_stops_both_stages(pipe):
    ids, steps = [], []

    def stop(step, newest):
        ids.append(newest)
        pipe._interrupt = step == 2

    def watch(denoiser, step, timestep, tensors):
        steps.append(step)
        return {}

    out = pipe("a cat", output_type="latent", callback_on_token=stop, callback_on_step_end=watch, generator=seeded(0))
    assert len(ids) == 3 and out.visual_tokens.lengths.tolist() == [3] and steps == []


def test_interrupt_set_by_another_thread_stops_the_running_calls(pipe):
    started, pressed, steps = threading.Event(), threading.Event(), []

    def watch(denoiser, step, timestep, tensors):
        steps.append(step)
        started.set()
        assert pressed.wait(60)
        return {}

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(lambda: pipe(visual_tokens=codes(4), num_inference_steps=4, callback_on_step_end=watch))
        assert started.wait(60)
        pipe._interrupt = True
        pressed.set()
        drawing.result()
    assert steps == [0]


def test_a_deep_copy_draws_the_same_and_shares_nothing(pipe):
    twin = copy.deepcopy(pipe)
    assert torch.equal(*(latents_of(each, "a cat", generator=seeded(1)) for each in (pipe, twin)))
    assert twin.unet is not pipe.unet and twin.model is not pipe.model
    with torch.no_grad():
        twin.unet.conv_out.weight.zero_()
    assert latents_of(pipe, "a cat", generator=seeded(1)).any()


def _draw_in_process(pickled: bytes) -> torch.Tensor:
    return latents_of(pickle.loads(pickled), "a cat", generator=seeded(1))


@pytest.mark.slow
def test_a_spawned_process_draws_the_same(pipe):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        drawn = pool.apply(_draw_in_process, (pickle.dumps(pipe),))
    assert torch.equal(drawn, latents_of(pipe, "a cat", generator=seeded(1)))


def test_saving_while_another_thread_draws_saves_the_pipeline_and_draws_the_image(tmp_path):
    pipe = tiny_pipeline()
    wanted = latents_of(pipe, "a cat", generator=seeded(1))
    drawn, begun = [], threading.Event()

    def watch(denoiser, step, timestep, tensors):
        begun.set()
        return {}

    def draw():
        drawn.extend(latents_of(pipe, "a cat", generator=seeded(1), callback_on_step_end=watch) for _ in range(4))

    thread = threading.Thread(target=draw)
    thread.start()
    assert begun.wait(60)
    pipe.save_pretrained(tmp_path)
    thread.join()
    assert len(drawn) == 4 and all(torch.equal(one, wanted) for one in drawn)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents_of(loaded, "a cat", generator=seeded(1)), wanted)
