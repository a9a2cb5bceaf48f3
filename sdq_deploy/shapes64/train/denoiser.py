"""The denoiser and its text encoder, trained together on noise prediction with classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTokenizer

from sdq_deploy.shapes64.captions import contents_of
from sdq_deploy.shapes64.train.dataset import drawn_captions
from sdq_deploy.shapes64.train.latents import encoded_scenes
from sdq_deploy.shapes64.train.loop import LoopConfig, StepRandom, run_loop
from sdq_deploy.shapes64.train.text import MAX_LENGTH, TEXT_WIDTH, build_text_encoder, build_tokenizer, save_tokenizer

__all__ = ["DenoiserConfig", "Ema", "build_scheduler", "build_unet", "prepare_denoiser", "train_denoiser"]


@dataclass(frozen=True)
class DenoiserConfig:
    """`scenes` drawn scenes in batches of `batch`; `snr_limit` is gamma of min-SNR weighting (arXiv:2303.09556).

    `shares` is how much of a batch shows one, two and three shapes: the crowded ones, which are the rarest and the
    hardest, come more often than they are drawn.
    """

    scenes: int = 60_000
    batch: int = 64
    shares: tuple[float, float, float] = (0.20, 0.40, 0.40)
    empty_captions: float = 0.1
    ema_decay: float = 0.999
    snr_limit: float = 5.0


def build_unet() -> UNet2DConditionModel:
    """Three levels (8x8, 4x4, 2x2), cross-attention on the first two and in the middle; random weights."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=BLOCK_OUT_CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


BLOCK_OUT_CHANNELS = (96, 128, 160)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; `clip_sample=False` keeps each step a linear map."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class Ema:
    """A running average of the parameters of `modules`, with a decay that grows to `decay` over the first steps."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
        self._average = {key: p.detach().clone() for key, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self._average[key].copy_(value)

    @torch.no_grad()
    def copy_to_modules(self) -> None:
        for key, parameter in self._live.items():
            parameter.copy_(self._average[key])


def prepare_denoiser(loop: LoopConfig, vae: Path, cache: Path, config: DenoiserConfig = DenoiserConfig()) -> None:
    """Write the tokenizer, unless an earlier run did, and the encoded scenes: what every process then reads."""
    folder = loop.out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(build_tokenizer(), folder)
    encoded_scenes(vae, CLIPTokenizer.from_pretrained(folder), cache, config.scenes, loop.device)


def train_denoiser(loop: LoopConfig, vae: Path, cache: Path, config: DenoiserConfig = DenoiserConfig()) -> None:
    """Train from the folder of a trained autoencoder; the checkpoint in `loop.out` is what `assemble` reads.

    `prepare_denoiser` comes first.
    """
    tokenizer = CLIPTokenizer.from_pretrained(loop.out / "tokenizer")
    latents, ids = encoded_scenes(vae, tokenizer, cache, config.scenes, loop.device)
    torch.manual_seed(loop.seed)
    unet, text_encoder = build_unet().to(loop.device), build_text_encoder(tokenizer).to(loop.device)
    if loop.device == "cpu":
        # The fused attention's backward took a third of a step's CPU time; plain products take a tenth.
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    ema = Ema(modules, config.ema_decay)
    parameters = [p for module in modules.values() for p in module.parameters()]
    fused = loop.device in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=loop.peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    empty = tokenizer("", padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids[0]
    alphas = build_scheduler().alphas_cumprod
    chances = _chances(drawn_captions(cache, config.scenes), config.shares)

    def loss_of(random: StepRandom) -> torch.Tensor:
        batch = _draw_batch(latents, ids, chances, empty, alphas, config, random)
        return _loss(unet, text_encoder, {key: value[random.share].to(loop.device) for key, value in batch.items()})

    run_loop(loop, {**modules, "ema": ema}, optimizer, loss_of, lambda step: ema.update())


def _chances(captions: list[str], shares: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """The chance of each scene to be drawn into a batch, so that numbers of shapes have their `shares`."""
    counts = np.asarray([len(contents_of(caption)) for caption in captions]) - 1
    chances: npt.NDArray[np.float64] = (np.asarray(shares) / np.bincount(counts, minlength=3))[counts]
    chances /= chances.sum()
    return chances


def _draw_batch(
    latents: torch.Tensor,
    ids: torch.Tensor,
    chances: npt.NDArray[np.float64],
    empty: torch.Tensor,
    alphas: torch.Tensor,
    config: DenoiserConfig,
    random: StepRandom,
) -> dict[str, torch.Tensor]:
    """Noised latents with their timesteps, one timestep drawn from each of `batch` equal parts of the schedule."""
    chosen = torch.from_numpy(random.numpy.choice(len(latents), config.batch, p=chances))
    clean, tokens = latents[chosen], ids[chosen].clone()
    tokens[torch.rand(config.batch, generator=random.torch) < config.empty_captions] = empty
    strata = (torch.arange(config.batch) + torch.rand(config.batch, generator=random.torch)) / config.batch
    timesteps = (strata * len(alphas)).long().clamp_(max=len(alphas) - 1)
    noise = torch.randn(clean.shape, generator=random.torch)
    alpha = alphas[timesteps]
    signal, spread = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    snr = alpha / (1 - alpha)
    return {
        "noisy": signal * clean + spread * noise,
        "noise": noise,
        "timesteps": timesteps,
        "tokens": tokens,
        "weight": snr.clamp(max=config.snr_limit) / snr,
    }


def _loss(unet: nn.Module, text_encoder: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.autocast(batch["noisy"].device.type, torch.bfloat16):
        states = text_encoder(batch["tokens"])[0]
        predicted = unet(batch["noisy"], batch["timesteps"], states).sample
    error: torch.Tensor = (predicted.float() - batch["noise"]).square().mean(dim=(1, 2, 3))
    return (error * batch["weight"]).mean()
