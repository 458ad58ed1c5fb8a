"""Class-conditional image generation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    ImagePipelineOutput,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mhla_diffusion.backbones import MHLADiTTransformer2DModel

from .model_card import CardedPipeline, Purpose
from .requests import ClassNames, require_generators, require_positive
from .schedulers import LEARNED_VARIANCES, prediction_of, reads_variance

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class MHLADiTPipeline(CardedPipeline):
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
    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]

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
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, label: int | str | list[Any]) -> list[int]:
        """Class ids of names; ids pass through, and lists in lists are one list, as for DiTPipeline.

        Raises:
            ValueError: for a name that means no class or several, or an id that is out of range.
        """
        return self.class_names.find(label, self.transformer.config.num_embeds_ada_norm)

    def check_inputs(
        self,
        class_labels: list[int],
        height: int,
        width: int,
        output_type: str,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuse what cannot run before any work is done."""
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height} x {width}")
        if not class_labels or num_images_per_prompt < 1:
            raise ValueError("nothing to generate: class_labels is empty or num_images_per_prompt below 1")
        count = len(class_labels) * num_images_per_prompt
        require_generators(generator, count)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)} are not among "
                f"{self._callback_tensor_inputs}"
            )
        self.require_scheduler()

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise ``[batch_size, C, height / vae_scale_factor, width / vae_scale_factor]``, or the one given.

        Raises:
            ValueError: when the latents given have another shape.
        """
        config, factor = self.transformer.config, self.vae_scale_factor
        shape = (batch_size, config.in_channels, height // factor, width // factor)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

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
        callback_on_step_end: Callable[..., dict[str, Any]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        size = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = height or size, width or size
        require_positive(num_inference_steps=num_inference_steps)
        ids = self.get_label_ids(class_labels)
        self.check_inputs(ids, height, width, output_type, num_images_per_prompt, generator, tensor_inputs)
        self._guidance_scale = guidance_scale
        self._interrupt = False

        device = self._execution_device
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(len(labels), height, width, generator, latents)
        step_kwargs = self._step_kwargs(generator)

        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with _all_channels(self.scheduler), self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(latents, t, labels)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                if i == len(timesteps) - 1 or (
                    i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What the scheduler takes a step with: the model's guided prediction, ``[B, C, h, w]``.

        Where the model learned a variance it is passed on to schedulers that read one.
        """
        null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        if self.do_classifier_free_guidance:
            latents, labels = torch.cat([latents, latents]), torch.cat([labels, null])
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        output = self.transformer(
            latents, timestep=t.expand(len(latents)), class_labels=labels, return_dict=False
        )[0]
        prediction, variance = output.split([latents.shape[1], output.shape[1] - latents.shape[1]], dim=1)
        if self.do_classifier_free_guidance:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            variance = variance.chunk(2)[0]
        if reads_variance(self.scheduler):
            prediction = torch.cat([prediction, variance], dim=1)
        return prediction

    def _step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """The generator, for schedulers that draw noise."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(latents.float(), output_type=output_type)

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


@contextmanager
def _all_channels(scheduler: Any) -> Iterator[None]:
    """Let fast solvers step with every channel of a prediction.

    Made from the config of a scheduler with a learned variance, the DPM-Solver family cuts predictions to
    three channels. What it is given here holds no variance.
    """
    variance_type = scheduler.config.get("variance_type")
    if variance_type not in LEARNED_VARIANCES or reads_variance(scheduler):
        yield
        return
    scheduler.register_to_config(variance_type=None)
    try:
        yield
    finally:
        scheduler.register_to_config(variance_type=variance_type)
