"""What a sample is shown depends on it, the seed and the step alone."""

import torch

from modeling_lavit.training.data.augmentation import SampleNoise, augment


def test_augmentation_leaves_white_white_and_can_be_switched_off():
    white, noise = torch.ones(4, 3, 16, 16), SampleNoise(torch.arange(4), step=0)
    assert torch.allclose(augment(white, noise), white, atol=1e-5)
    images = torch.rand(4, 3, 16, 16)
    still = {"scale": 0.0, "shift": 0.0, "rotation": 0.0, "tint": 0.0, "flip": 0.0}
    torch.testing.assert_close(augment(images, noise, share=1.0, **still), images, atol=1e-4, rtol=0)
    assert torch.equal(augment(images, noise, share=0.0), images)
    assert not torch.allclose(augment(images, noise, share=1.0), images, atol=1e-2)


def test_noise_belongs_to_the_sample_whatever_the_batch():
    whole = SampleNoise(torch.tensor([3, 8, 5]), step=2, seed=1)
    alone = SampleNoise(torch.tensor([8]), step=2, seed=1)
    assert torch.equal(whole.of(torch.tensor([False, True, False])).uniform(4, 2), alone.uniform(4, 2))
    assert torch.equal(whole.uniform(4, 2)[1], alone.of(torch.tensor([True])).uniform(4, 2)[0])
    for other in (SampleNoise(torch.tensor([8]), step=3, seed=1), SampleNoise(torch.tensor([8]), step=2, seed=2)):
        assert not torch.equal(other.uniform(4), alone.of(torch.tensor([True])).uniform(4))
