"""Text-to-image generation with models that this package trained."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ImagePipelineOutput,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from mhla_diffusion.arguments import require_finite, require_positive
from mhla_diffusion.autoencoders import vae_scale_factor
from mhla_diffusion.backbones import MHLAPixArtTransformer2DModel, MHLASanaTransformer2DModel

from .denoising import ImagePipeline, StepCallback
from .model_card import Purpose
from .schedulers import prediction_of
from .text import SANA_INSTRUCTION, encode_texts, warn_of_long_prompts


class MHLATextToImagePipeline(ImagePipeline):
    """Generates images of texts, in pixels or latents; knows the size and the text it was trained with.

    The sibling of :class:`diffusers.PixArtSigmaPipeline` and :class:`diffusers.SanaPipeline`, which need an
    autoencoder, and have lengths of text and sizes of their own as defaults.

    Args:
        tokenizer, text_encoder: of transformers, of any kind; see :func:`.text.encode_texts`.
        transformer: the model.
        scheduler: any diffusers scheduler for what the model was trained to predict.
        vae: decodes latents; None when the model works on pixels, in one channel (gray) or three.
        max_sequence_length: tokens that prompts are cut or filled up to, as in training.
        instruction: put in front of prompts, as in training.
        training: facts about the training for the model card.
        prediction_type: what the model predicts; see :class:`MHLADiTPipeline`.
    """

    purpose = Purpose("Text-to-image generation", task="text-to-image")
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: PreTrainedModel,
        transformer: MHLAPixArtTransformer2DModel | MHLASanaTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        max_sequence_length: int = 300,
        instruction: str = "",
        training: dict | None = None,
        prediction_type: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
        )
        self.register_to_config(
            max_sequence_length=max_sequence_length,
            instruction=instruction,
            training=training,
            prediction_type=prediction_type or prediction_of(scheduler),
        )
        self.prepare_decoding()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        guidance_scale: float = 4.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: what the images show, one image each.
            negative_prompt: what they should not show.
            guidance_scale: above 1 for classifier-free guidance.
            generator: one, or one for each image.
            num_inference_steps: denoising steps.
            output_type: ``"pil"``; ``"np"`` ``[B, H, W, C]`` or ``"pt"`` ``[B, C, H, W]`` in [0, 1];
                ``"latent"``.
            return_dict: whether to return an ``ImagePipelineOutput`` instead of a tuple.
            height, width: in pixels, the size the model was trained at by default.
            num_images_per_prompt: images for each prompt.
            latents: the start noise, ``[B, C, h, w]``, instead of drawing it.
            prompt_embeds, prompt_attention_mask: ``[B, L, D]`` and ``[B, L]`` in place of the prompt.
            negative_prompt_embeds, negative_prompt_attention_mask: in place of the negative prompt.
            max_sequence_length: tokens that prompts are cut or filled up to; as in training by default. A
                warning names those that are cut.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see :class:`MHLADiTPipeline`.

        Returns:
            ``images``, in the order of the prompts.

        Raises:
            ValueError: for a prompt, size, scheduler or argument that does not fit.
        """
        require_positive(num_images_per_prompt=num_images_per_prompt, max_sequence_length=max_sequence_length)
        require_finite(guidance_scale=guidance_scale)
        told = self.encode_prompt(
            prompt, prompt_embeds, prompt_attention_mask, max_sequence_length, self.config.instruction
        )
        untold = told
        if guidance_scale > 1:
            untold = self._encode_negative(
                negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, told[0].shape
            )
        count = len(told[0]) * num_images_per_prompt
        names = ("encoder_hidden_states", "encoder_attention_mask")
        arguments = [
            {
                name: x.repeat_interleave(num_images_per_prompt, 0)
                for name, x in zip(names, texts, strict=True)
            }
            for texts in (told, untold)
        ]
        return self.generate(
            *arguments, count=count, height=height, width=width,
            guidance_scale=guidance_scale, generator=generator, num_inference_steps=num_inference_steps,
            output_type=output_type, return_dict=return_dict, latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        instruction: str = "",
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[B, L, D]`` and mask ``[B, L]``: those given, or the prompt's.

        Raises:
            ValueError: when neither is given, or both.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        length = max_sequence_length or self.config.max_sequence_length
        if prompt_embeds is not None:
            if prompt:
                raise ValueError("give a prompt or its embeddings, not both")
            mask = prompt_attention_mask
            mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.int64) if mask is None else mask
            if mask.shape != prompt_embeds.shape[:2]:
                raise ValueError(
                    f"the mask must be {tuple(prompt_embeds.shape[:2])}, as its embeddings, got "
                    f"{tuple(mask.shape)}"
                )
            return prompt_embeds.to(device, dtype), mask.to(device)
        if prompt is None or prompt in ([], ()):
            raise ValueError("nothing to generate: give a prompt or prompt_embeds")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder: give prompt_embeds, and negative_prompt_embeds"
            )
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a prompt must be a text or a list of texts, got {prompt!r}")
        texts = list(texts)
        warn_of_long_prompts(self.tokenizer, length, texts)
        embeddings, mask = encode_texts(
            self.tokenizer,
            self.text_encoder,
            texts,
            max_length=length,
            instruction=instruction,
            device=device,
        )
        return embeddings.to(dtype), mask

    def _encode_negative(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        shape: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        """Return what stands for none in guidance, of the shape that the prompts' embeddings have."""
        texts: Any = list(prompt) if prompt and isinstance(prompt, (list, tuple)) else [prompt or ""]
        texts = texts * (shape[0] if len(texts) == 1 else 1)
        if prompt_embeds is not None and not prompt:
            texts = None  # the default
        found, mask = self.encode_prompt(texts, prompt_embeds, prompt_attention_mask, shape[1])
        if len(found) == 1:
            found, mask = found.expand(shape[0], -1, -1), mask.expand(shape[0], -1)
        if len(found) != shape[0]:
            raise ValueError(
                f"{len(found)} negative prompts for {shape[0]} prompts: give one, or one for each"
            )
        if found.shape != shape:
            raise ValueError(
                "prompt_embeds and negative_prompt_embeds must have one shape, got "
                f"{tuple(shape)} and {tuple(found.shape)}"
            )
        return found, mask

    @property
    def latents_dtype(self) -> torch.dtype:
        """Precision that steps are taken in: of Sana float32, whatever the model has, as in SanaPipeline."""
        sana = isinstance(self.transformer, MHLASanaTransformer2DModel)
        return torch.float32 if sana else super().latents_dtype

    def texts_for_callback(self, told: dict[str, Tensor], untold: dict[str, Tensor]) -> dict[str, Any]:
        """Return the embeddings as diffusers has them: with guidance the negative ones before the others."""
        text, negative = (arguments["encoder_hidden_states"] for arguments in (told, untold))
        if not self.do_classifier_free_guidance:
            return {"prompt_embeds": text, "negative_prompt_embeds": None}
        return {"prompt_embeds": torch.cat([negative, text]), "negative_prompt_embeds": negative}

    def take_from_callback(
        self, changed: dict[str, Tensor], told: dict[str, Tensor], untold: dict[str, Tensor]
    ) -> None:
        """Take the embeddings that :meth:`texts_for_callback` gave, or those of the prompts alone.

        Raises:
            ValueError: for another number of rows.
        """
        if (text := changed.get("prompt_embeds")) is None:
            return
        rows = len(told["encoder_hidden_states"])
        if len(text) not in (rows, 2 * rows):
            raise ValueError(
                f"a callback returned prompt_embeds of {len(text)} rows for {rows} images; give {rows}, or "
                f"{2 * rows} with those of the negative prompts first"
            )
        told["encoder_hidden_states"] = text[-rows:]
        if len(text) > rows:
            untold["encoder_hidden_states"] = text[:rows]

    def example_call(self) -> str:
        return 'images = pipe("...").images'

    def sizes(self) -> dict[str, str]:
        size = self.transformer.config.sample_size * self.vae_scale_factor
        return {
            "size": f"{size} x {size} pixels, {'pixel space' if self.vae is None else 'latents'}",
            "text encoder": f"{type(self.text_encoder).__name__}, {self.config.max_sequence_length} tokens",
            "prediction": self.config.prediction_type,
        }


def stock_pipeline(
    transformer: Any, scheduler: Any, vae: Any, max_sequence_length: int, instruction: str, **parts: Any
) -> Any:
    """Return the pipeline class of diffusers whose defaults are those that a model was trained with.

    Args:
        transformer, scheduler, vae, max_sequence_length, instruction: see :class:`MHLATextToImagePipeline`.
        parts: further components, which are as they are.

    Returns:
        None where there is no such class: without an autoencoder, for sizes that the pipelines do not know,
        and for texts of another length or instruction.
    """
    pixels, size = vae_scale_factor(vae), transformer.config.sample_size
    if isinstance(transformer, MHLASanaTransformer2DModel):
        found, texts, known = (
            SanaPipeline,
            (300, SANA_INSTRUCTION),
            pixels == 32 and size in (16, 32, 64, 128),
        )
    else:
        alpha = transformer.use_additional_conditions
        found, texts = (PixArtAlphaPipeline, (120, "")) if alpha else (PixArtSigmaPipeline, (300, ""))
        known = pixels == 8 and size in ((128,) if alpha else (32, 64, 256))
        known = known and hasattr(scheduler, "scale_model_input")
    shifted = vae is not None and vae.config.get("shift_factor")
    return found if known and not shifted and (max_sequence_length, instruction) == texts else None


# The name under which diffusers records the class, free of our file layout.
MHLATextToImagePipeline.__module__ = "mhla_diffusion"
