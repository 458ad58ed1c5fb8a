"""Text-to-video generation with models that this package trained."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from mhla_diffusion.backbones import MHLAWanTransformer3DModel

from .model_card import CardedPipeline, Purpose
from .text import warn_of_long_prompts


class MHLAWanPipeline(CardedPipeline, WanPipeline):
    """:class:`diffusers.WanPipeline` that also works on pixels, and knows the size it was trained at.

    Any text encoder of transformers will do whose ``last_hidden_state`` is as wide as the model's
    ``text_dim``, and any flow-matching scheduler.

    Args:
        tokenizer, text_encoder, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps: as
            for :class:`diffusers.WanPipeline`.
        vae: decodes latents; None when the model works on pixels, in one channel (gray) or three.
        max_sequence_length: tokens that prompts are cut or filled up to, as in training.
        fps: frames per second of the clips it was trained on.
        training: facts about the training for the model card.
    """

    purpose = Purpose("Text-to-video generation", task="text-to-video", tag="text-to-video")
    _optional_components: ClassVar = ["vae", "transformer", "transformer_2"]

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: PreTrainedModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLWan | None = None,
        transformer: MHLAWanTransformer3DModel | None = None,
        transformer_2: MHLAWanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        max_sequence_length: int = 512,
        fps: float = 16.0,
        training: dict | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.register_to_config(max_sequence_length=max_sequence_length, fps=fps, training=training)

    @property
    def _model(self) -> MHLAWanTransformer3DModel:
        """The transformer, or the second when it takes all steps."""
        return self.transformer if self.transformer is not None else self.transformer_2

    @property
    def pixels_per_token(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        patch = self._model.config.patch_size
        if self.vae is None:
            return tuple(patch)
        factor = self.vae_scale_factor_spatial
        return (patch[0] * self.vae_scale_factor_temporal, patch[1] * factor, patch[2] * factor)

    @property
    def default_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that the model was made for."""
        grid = self._model.config.sample_grid
        frames, height, width = (n * p for n, p in zip(grid, self.pixels_per_token, strict=True))
        # An autoencoder of videos makes one latent frame of the first, then one of every four.
        return frames if self.vae is None else frames - self.vae_scale_factor_temporal + 1, height, width

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        *,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos; as :meth:`diffusers.WanPipeline.__call__`, with the training's sizes as defaults.

        Args:
            prompt: what the videos show.
            negative_prompt: what they should not show.
            height, width: in pixels.
            num_frames: with an autoencoder of videos one more than a multiple of four.
            num_videos_per_prompt: videos for each prompt.
            generator: one, or one for each video.
            latents: the start noise, ``[B, C, F, H, W]``.
            prompt_embeds: ``[B, L, text_dim]`` in place of the prompt.
            output_type: ``"np"`` ``[B, F, H, W, C]`` or ``"pt"`` ``[B, F, C, H, W]`` in 0 to 1; ``"pil"``;
                ``"latent"``.
            return_dict: whether to return a ``WanPipelineOutput`` instead of a tuple.
            max_sequence_length: tokens that prompts are cut or filled up to; as in training by default. A
                warning names those that are cut.
            kwargs: num_inference_steps, guidance_scale, negative_prompt_embeds, attention_kwargs,
                callback_on_step_end and its tensor inputs, as for WanPipeline.

        Returns:
            ``frames``, one video for each prompt.

        Raises:
            ValueError: for sizes or latents that do not fit the model.
        """
        frames, default_height, default_width = self.default_size
        size = (num_frames or frames, height or default_height, width or default_width)
        call: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "num_videos_per_prompt": num_videos_per_prompt,
            "generator": generator,
            "max_sequence_length": max_sequence_length or self.config.max_sequence_length,
            **kwargs,
        }
        warn_of_long_prompts(self.tokenizer, call["max_sequence_length"], prompt, negative_prompt)
        if self.vae is not None:
            return super().__call__(
                num_frames=size[0], height=size[1], width=size[2], latents=latents,
                output_type=output_type, return_dict=return_dict, **call,
            )  # fmt: skip
        given = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        if given is None:
            raise ValueError("nothing to generate: give a prompt or prompt_embeds")
        noise = self._pixel_noise(len(given) * num_videos_per_prompt, size, generator, latents)
        # The base class would check sizes against the autoencoder that is not there; noise given, it does not
        # use them.
        multiple = 16 * math.lcm(*self.pixels_per_token)
        video = super().__call__(
            num_frames=1, height=multiple, width=multiple, latents=noise, output_type="latent",
            return_dict=False, **call,
        )[0]  # fmt: skip
        if output_type != "latent":
            video = self.video_processor.postprocess_video(video.float(), output_type=output_type)
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def _pixel_noise(
        self,
        batch_size: int,
        size: tuple[int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        if any(side < 1 or side % p for side, p in zip(size, self.pixels_per_token, strict=True)):
            raise ValueError(
                f"num_frames, height and width must be multiples of {self.pixels_per_token}, got {size}"
            )
        shape = (batch_size, self._model.config.in_channels, *size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents

    def example_call(self) -> str:
        return 'video = pipe("...").frames[0]  # [F, H, W, C] in 0 to 1'

    def sizes(self) -> dict[str, str]:
        frames, height, width = self.default_size
        space = "pixel space" if self.vae is None else "latents"
        return {
            "size": f"{frames} frames of {height} x {width} pixels at {self.config.fps:g} a second, {space}",
            "text encoder": f"{type(self.text_encoder).__name__}, {self.config.max_sequence_length} tokens",
        }


# The name under which diffusers records the class, free of our file layout.
MHLAWanPipeline.__module__ = "mhla_diffusion"
