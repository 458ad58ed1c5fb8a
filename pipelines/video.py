"""Text-to-video generation with models that this package trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from mhla_diffusion.arguments import require_finite, require_positive
from mhla_diffusion.autoencoders import size_in_pixels, vae_strides
from mhla_diffusion.backbones import MHLAWanTransformer3DModel

from .model_card import CardedPipeline, Purpose
from .requests import count_samples, require_generators
from .schedulers import prediction_of
from .text import embed, warn_of_long_prompts


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
        sample_size: frames, height and width in pixels of these clips, the size that it makes by default; the
            transformer's ``sample_grid`` when None.
        training: facts about the training for the model card.
        prediction_type: what the model predicts, ``"flow_prediction"`` (the velocity of flow matching) or
            ``"flow_sample"`` (its clean sample). Taken from the first scheduler when None, and held against
            later ones.
    """

    purpose = Purpose("Text-to-video generation", task="text-to-video")
    scales_inputs = False
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
        sample_size: Sequence[int] | None = None,
        prediction_type: str | None = None,
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
        self.register_to_config(
            max_sequence_length=max_sequence_length,
            fps=fps,
            training=training,
            sample_size=None if sample_size is None else list(sample_size),
            prediction_type=prediction_type or prediction_of(scheduler, scaled=False),
        )

    @property
    def _model(self) -> MHLAWanTransformer3DModel:
        """The transformer, or the second when it takes all steps."""
        return self.transformer if self.transformer is not None else self.transformer_2

    @property
    def pixels_per_token(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        patch, (time, space) = self._model.config.patch_size, vae_strides(self.vae)
        return tuple(p * stride for p, stride in zip(patch, (time, space, space), strict=True))

    @property
    def default_size(self) -> tuple[int, ...]:
        """Frames, height and width of the clips that it was trained on, else that the model was made for."""
        if self.config.sample_size is not None:
            return tuple(self.config.sample_size)
        config = self._model.config
        latents = [n * p for n, p in zip(config.sample_grid, config.patch_size, strict=True)]
        return size_in_pixels(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as the base class has it)
        max_sequence_length: int | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos; as :meth:`diffusers.WanPipeline.__call__`, with the training's sizes as defaults.

        Args:
            prompt: what the videos show.
            negative_prompt: what they should not show.
            height, width: in pixels.
            num_frames: with an autoencoder of videos one more than a multiple of four.
            num_inference_steps: denoising steps.
            guidance_scale: above 1 for classifier-free guidance; ``guidance_scale_2`` is that of the second
                transformer, where there is one.
            num_videos_per_prompt: videos for each prompt.
            generator: one, or one for each video.
            latents: the start noise, ``[B, C, F, H, W]``.
            prompt_embeds: ``[B, L, text_dim]`` in place of the prompt; ``negative_prompt_embeds`` likewise.
            output_type: ``"np"`` ``[B, F, H, W, C]`` or ``"pt"`` ``[B, F, C, H, W]`` in 0 to 1; ``"pil"``;
                ``"latent"``.
            return_dict: whether to return a ``WanPipelineOutput`` instead of a tuple.
            attention_kwargs: handed to the transformer, such as ``{"scale": ...}`` for LoRA.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step;
                what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.
            max_sequence_length: tokens that prompts are cut or filled up to; as in training by default. A
                warning names those that are cut.

        Returns:
            ``frames``, one video for each prompt.

        Raises:
            ValueError: for sizes, latents or a scheduler that do not fit the model.
        """
        self.require_scheduler()
        frames, default_height, default_width = self.default_size
        size = (num_frames or frames, height or default_height, width or default_width)
        require_positive(
            num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        require_finite(guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2)
        count = count_samples(prompt, negative_prompt, prompt_embeds, num_videos_per_prompt)
        require_generators(generator, count)
        call: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "num_videos_per_prompt": num_videos_per_prompt or 1,
            "generator": generator,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length or self.config.max_sequence_length,
        }
        warn_of_long_prompts(self.tokenizer, call["max_sequence_length"], prompt, negative_prompt)
        if self.vae is not None:
            return super().__call__(
                num_frames=size[0], height=size[1], width=size[2], latents=latents,
                output_type=output_type, return_dict=return_dict, **call,
            )  # fmt: skip
        noise = self._pixel_noise(count, size, generator, latents)
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

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Embed prompts ``[B num_videos_per_prompt, L, D]``, zeros after each, with any text encoder.

        That of the base class takes the first embeddings, which are no text's when its tokenizer fills up at
        the beginning, as those of decoders do.
        """
        texts = [prompt_clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt or ())]
        device = device or self._execution_device
        text, mask = embed(
            self.tokenizer, self.text_encoder, texts, length=max_sequence_length, device=device
        )
        text = text.masked_fill(mask[..., None] == 0, 0.0).to(dtype or self.text_encoder.dtype)
        return text.repeat_interleave(num_videos_per_prompt, 0)

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
