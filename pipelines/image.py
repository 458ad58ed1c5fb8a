"""Class-conditional image generation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from mhla_diffusion.backbones import MHLADiTTransformer2DModel

from .denoising import ImagePipeline, StepCallback
from .model_card import Purpose
from .requests import ClassNames
from .schedulers import prediction_of


class MHLADiTPipeline(ImagePipeline):
    """Generates images of given classes with an MHLA DiT; the sibling of :class:`diffusers.DiTPipeline`.

    Args:
        transformer: the model; a stock DiT will do, on square images.
        scheduler: any diffusers scheduler for what the model was trained to predict.
        vae: decodes latents; None when the model works on pixels.
        id2label: class id to its name, or names separated by commas.
        training: facts about the training for the model card, such as ``{"data": ..., "steps": ...}``.
        prediction_type: what the model predicts, ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or
            ``"flow_prediction"`` (the velocity of flow matching) or ``"flow_sample"`` (its clean sample).
            Taken from the first scheduler when None, and held against later ones.
    """

    purpose = Purpose("Class-conditional image generation", task="unconditional-image-generation")
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: MHLADiTTransformer2DModel | DiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        training: dict | None = None,
        prediction_type: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=None if id2label is None else {str(key): name for key, name in id2label.items()},
            training=training,
            prediction_type=prediction_type or prediction_of(scheduler),
        )
        self.class_names = ClassNames(id2label)
        self.labels = self.class_names.ids
        self.prepare_decoding()

    def get_label_ids(self, label: int | str | list[Any]) -> list[int]:
        """Class ids of names; ids pass through, and lists in lists are one list, as for DiTPipeline.

        Raises:
            ValueError: for a name that means no class or several, or an id that is out of range.
        """
        return self.class_names.find(label, self.transformer.config.num_embeds_ada_norm)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            class_labels: class ids or names, one image each.
            guidance_scale: above 1 for classifier-free guidance.
            generator: one, or one for each image.
            num_inference_steps: denoising steps.
            output_type: ``"pil"``; ``"np"`` ``[B, H, W, C]`` or ``"pt"`` ``[B, C, H, W]`` in [0, 1];
                ``"latent"``.
            return_dict: whether to return an ``ImagePipelineOutput`` instead of a tuple.
            height, width: in pixels, the size the model was trained at by default.
            num_images_per_prompt: images for each class label.
            latents: the start noise, ``[B, C, h, w]``, instead of drawing it.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step;
                what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs: names of tensors it gets, ``["latents"]``.

        Returns:
            ``images``, in the order of the labels.

        Raises:
            ValueError: for a class, size, scheduler or argument that does not fit.

        Example:
            >>> pipe = MHLAPipeline.from_pretrained("path/to/pipeline")
            >>> images = pipe(["seven", 3], generator=torch.manual_seed(0)).images
        """
        ids = self.get_label_ids(class_labels)
        count = len(ids) * num_images_per_prompt
        if count < 1:
            raise ValueError("nothing to generate: class_labels is empty or num_images_per_prompt below 1")
        labels = torch.tensor(ids, device=self._execution_device).repeat_interleave(num_images_per_prompt)
        null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        return self.generate(
            {"class_labels": labels}, {"class_labels": null}, count=count, height=height, width=width,
            guidance_scale=guidance_scale, generator=generator, num_inference_steps=num_inference_steps,
            output_type=output_type, return_dict=return_dict, latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip

    def example_call(self) -> str:
        return f"images = pipe({[next(iter(self.labels), 0)]!r}).images"

    def sizes(self) -> dict[str, str]:
        config = self.transformer.config
        size = config.sample_size * self.vae_scale_factor
        return {
            "size": f"{size} x {size} pixels, {'pixel space' if self.vae is None else 'latents'}",
            "classes": str(config.num_embeds_ada_norm),
            "prediction": self.config.prediction_type,
        }


# The name under which diffusers records the class, free of our file layout.
MHLADiTPipeline.__module__ = "mhla_diffusion"
