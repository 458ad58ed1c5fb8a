"""What generation of images has in common, whatever the model is told: sizes, steps, guidance, decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mhla_diffusion.arguments import require_finite, require_positive
from mhla_diffusion.autoencoders import vae_scale_factor

from .model_card import CardedPipeline
from .requests import require_generators
from .schedulers import LEARNED_VARIANCES, reads_variance

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


def size_arguments(
    transformer: Any, rows: int, height: int, width: int, *, device: torch.device | None = None
) -> dict[str, Any]:
    """Return what a transformer is told of the size of ``rows`` images in pixels; most are told nothing."""
    told = getattr(transformer, "size_arguments", None)
    return {} if told is None else told(rows, height, width, device=device)


class ImagePipeline(CardedPipeline, SanaLoraLoaderMixin):
    """Base of pipelines whose images are denoised by steps of any scheduler, in latents or in pixels.

    Adapters are loaded as by :class:`diffusers.SanaPipeline`: nothing in that is Sana's but the name.

    A subclass registers ``transformer``, ``scheduler``, ``vae`` (or None) and, in its config,
    ``prediction_type``; its call says what the model is told, and hands the rest to :meth:`generate`.
    """

    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    transformer: Any
    scheduler: Any
    vae: Any

    def prepare_decoding(self) -> None:
        """Make what turns latents into images; called once, with the components registered."""
        self.vae_scale_factor = vae_scale_factor(self.vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def latents_dtype(self) -> torch.dtype:
        """Precision that noise is drawn and steps are taken in."""
        return self.transformer.dtype

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

    def check_inputs(
        self,
        count: int,
        height: int,
        width: int,
        output_type: str,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuse what cannot run before any work is done."""
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height} x {width}")
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
        device, dtype = self._execution_device, self.latents_dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @torch.no_grad()
    def generate(
        self,
        told: dict[str, Tensor],
        untold: dict[str, Tensor],
        *,
        count: int,
        height: int | None,
        width: int | None,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
        output_type: str,
        return_dict: bool,
        latents: Tensor | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Denoise and decode; arguments as for the call of a subclass.

        Args:
            told, untold: arguments of the model with ``count`` rows each: the condition, and what stands for
                none in guidance. A callback may change them.
            count: images in all.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        size = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = (size if side is None else side for side in (height, width))
        require_positive(height=height, width=width, num_inference_steps=num_inference_steps)
        require_finite(guidance_scale=guidance_scale)
        self.check_inputs(count, height, width, output_type, generator, tensor_inputs)
        self._guidance_scale = guidance_scale
        self._interrupt = False

        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(count, height, width, generator, latents)
        step_kwargs = self._step_kwargs(generator)

        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with _all_channels(self.scheduler), self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(latents, t, told, untold)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {"latents": latents, **self.texts_for_callback(told, untold)}
                    tensors = {name: tensors[name] for name in tensor_inputs}
                    changed = callback_on_step_end(self, i, t, tensors)
                    latents = changed.get("latents", latents)
                    self.take_from_callback(changed, told, untold)
                if i == len(timesteps) - 1 or (
                    i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def texts_for_callback(self, told: dict[str, Tensor], untold: dict[str, Tensor]) -> dict[str, Any]:
        """Return what a callback can ask for beside the latents, by its name."""
        return {}

    def take_from_callback(
        self, changed: dict[str, Tensor], told: dict[str, Tensor], untold: dict[str, Tensor]
    ) -> None:
        """Put what a callback returned for these into what the model is told."""

    def _predict(
        self, latents: Tensor, t: Tensor, told: dict[str, Tensor], untold: dict[str, Tensor]
    ) -> Tensor:
        """What the scheduler takes a step with: the model's guided prediction, ``[B, C, h, w]``.

        Where the model learned a variance it is passed on to schedulers that read one.
        """
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        dtype = latents.dtype
        if self.do_classifier_free_guidance:
            latents = torch.cat([latents, latents])
            told = {name: torch.cat([told[name], untold[name]]) for name in told}
        sizes = size_arguments(self.transformer, len(latents), height, width, device=latents.device)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        output = self.transformer(
            latents.to(self.transformer.dtype),
            # Sana's scale, read from the config, which models of diffusers have as well.
            timestep=t.expand(len(latents)) * self.transformer.config.get("timestep_scale", 1.0),
            return_dict=False,
            **told,
            **sizes,
        )[0].to(dtype)
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
            latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(latents.float(), output_type=output_type)


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
