"""A pipeline of a handful of numbers, small enough for its expected reward to be computed."""

import torch
from diffusers import DDIMScheduler

from alignprop.rollout import Sampler
from alignprop.spec import PipelineSpec

NUM_ELEMENTS = 3
NUM_STEPS = 3
LARGE = 1000.0
"""Pixels are latents in [-LARGE, LARGE], brought to [0, 1]: nothing is ever clamped."""
SPEC = PipelineSpec(("unet",), "vae", value_range=(-LARGE, LARGE))
DIRECTION = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Denoiser(torch.nn.Module):
    """Predicts the noise as a linear function of the latents."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.linspace(-0.5, 0.5, NUM_ELEMENTS, dtype=torch.float64).view(-1, 1, 1))

    def forward(self, sample, timestep):
        return (self.slope * sample + self.offset,)


class Identity(torch.nn.Module):
    """Decodes latents to themselves."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def decode(self, latents):
        return (latents,)


class ToyPipeline:
    """DDIM over 1x1 latents of three channels; each prompt and seed count as one picture."""

    def __init__(self):
        self.unet, self.vae, self.device = Denoiser(), Identity(), torch.device("cpu")
        self.scheduler = DDIMScheduler(beta_end=0.004, clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=NUM_STEPS, eta=0.0, generator=None, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        shape, seed = (len(prompt), NUM_ELEMENTS, 1, 1), generator[0]
        latents = torch.randn(shape, generator=seed, dtype=torch.float64)  # one generator: thousands would be slow
        for timestep in self.scheduler.timesteps:
            output = self.unet(latents, timestep)[0]
            latents = self.scheduler.step(output, timestep, latents, eta=eta, generator=seed, return_dict=False)[0]
        return (self.vae.decode(latents)[0],)


def sampler():
    """Of a fresh toy."""
    return Sampler(ToyPipeline(), spec=SPEC)


def reward(images, prompts):
    """Linear in the latents, so that its expectation is that of their mean."""
    return ((2 * images.flatten(1) - 1) * LARGE) @ DIRECTION


def expected_reward(pipeline, eta):
    """In closed form, by the means of DDIM's steps (arXiv 2010.02502, eq. 12), which are linear here."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(NUM_STEPS)
    alphas, stride = scheduler.alphas_cumprod.double(), 1000 // NUM_STEPS
    mean = torch.zeros(NUM_ELEMENTS, 1, 1, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        a_t, a_next = alphas[t], alphas[t - stride] if t >= stride else alphas[0]
        variance = eta**2 * (1 - a_next) / (1 - a_t) * (1 - a_t / a_next)
        eps = pipeline.unet.slope * mean + pipeline.unet.offset
        x_0 = (mean - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        mean = a_next**0.5 * x_0 + (1 - a_next - variance) ** 0.5 * eps
    return mean.flatten() @ DIRECTION
