"""Training loop, on accelerate, for any model, objective and kind of data.

What is particular to images or video is behind :class:`~mhla_diffusion.training.task.TrainingTask` and
:class:`~mhla_diffusion.training.data.stream.SampleSource`.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..files.text import flat_dict
from ..files.writing import commit, disk_errors, start_writing, write_folder
from ..processes import in_first_process
from . import checkpoints
from .adapters import merge_adapters, save_adapters, set_trainable
from .config import as_dict, write_config
from .data.fingerprint import fingerprint_of
from .data.stream import FOR_LOSS, BatchShare, SampleSource, SampleStream, sample_generator
from .idle import IdleRun
from .launcher import compile_as_launched, start_accelerator, tell_deepspeed, warn_of_idle_cores
from .nonfinite import refuse_step
from .objectives import Objective
from .progress import MetricsFile, Progress, StopRequest, Throughput
from .settings import RunConfig, parameter_groups, run_facts
from .sharding import AveragedWeights, autocast_forward, gather_in_dtype, gathered, reshard
from .sheets import SheetClock
from .task import TrainingTask

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model and leaves a pipeline.

    Writes into ``output_dir``: config.yaml, metrics.jsonl, checkpoints/, samples/, logs/ (trackers) and, at
    the end, pipeline/, and lora/ with the adapters if there are any.

    Args:
        model: called as ``model(noisy, timestep=..., return_dict=False, **conditioning)``.
        objective: see :class:`Objective`.
        source: the data; all but ``"samples"`` in its batches is conditioning.
        task: see :class:`TrainingTask`.
        run_config: of the whole run, saved and compared on resume.
        checkpoint: to go on from, as :func:`checkpoints.find_checkpoint` gives it.

    Raises:
        ValueError: when the batch does not divide over the processes, fp16 is asked for without a GPU, or the
            launcher says something else than the config.
    """

    def __init__(
        self,
        *,
        model: Any,
        objective: Objective,
        source: SampleSource,
        task: TrainingTask,
        run_config: RunConfig,
        checkpoint: Path | None = None,
    ) -> None:
        self.objective, self.source, self.task = objective, source, task
        self.run_config, self.config = run_config, run_config.trainer
        config, output_dir = self.config, Path(run_config.output_dir)
        self.output_dir = output_dir
        self.accelerator = start_accelerator(
            config, log_with=list(config.trackers) or None, project_dir=output_dir / "logs"
        )
        self.share = BatchShare(
            config.batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            micro_batches=config.gradient_accumulation_steps,
        )
        if self.accelerator.device.type == "cpu" and self.accelerator.is_main_process:
            warn_of_idle_cores(self.accelerator.num_processes)
        self.progress, self.fingerprint = Progress(), in_first_process(lambda: fingerprint_of(source))
        self.metrics = MetricsFile(output_dir / "metrics.jsonl")
        sampling, hidden = task.sampling, not self.accelerator.is_main_process
        self.sheet_clock = SheetClock(sampling.every, sampling.max_share, hidden=hidden)
        self._prepare(model)
        self._open_run(checkpoint)

    def _prepare(self, model: Any) -> None:
        config, optim = self.config, self.config.optimizer
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        set_trainable(model, self.run_config.trainable, self.run_config.lora)
        model.train()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = type(model).__name__
        logger.info("%s: %.1f M parameters, %d samples", name, parameters / 1e6, len(self.source))
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optim),
            lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
            fused=True,
        )  # fmt: skip
        partitioned = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if partitioned:
            tell_deepspeed(self.accelerator, config, self.share)
        compile_as_launched(model)
        if sharded := self.accelerator.is_fsdp2:
            gather_in_dtype(self.accelerator)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if sharded or partitioned:
            autocast_forward(self.model, self.accelerator.device, config.mixed_precision)
        self.objective.prepare(self.model, self.accelerator)
        # Not prepared: accelerate would step it once per process.
        self.lr_scheduler = get_scheduler(
            optim.schedule,
            self.optimizer,
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=config.max_steps,
        )
        # torch has no _foreach_copy_ of the tensors that FSDP 2 shards.
        whole = self.accelerator.distributed_type != DistributedType.FSDP
        self.ema = AveragedWeights(self._parameters(), decay=config.ema_decay, foreach=whole)
        self.accelerator.register_for_checkpointing(self.lr_scheduler, self.ema, self.progress)

    def _open_run(self, checkpoint: Path | None) -> None:
        """Restore the state and prepare the folder. Nothing is written before every process came this far."""
        self.accelerator.wait_for_everyone()
        set_seed(self.config.seed, device_specific=True)
        if checkpoint is not None:
            self._load(checkpoint)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_what_was_left(self.output_dir)
            checkpoints.set_newer_aside(self.output_dir, self.progress.step)
            write_config(self.run_config, self.output_dir / "config.yaml")
            self.metrics.forget_after(self.progress.step)
        if self.config.trackers:
            settings = {key: str(value) for key, value in flat_dict(as_dict(self.run_config)).items()}
            self.accelerator.init_trackers(self.output_dir.name, config=settings)

    def train(self) -> int:
        """Train to the last step and save the pipeline.

        Returns:
            0, or the number of the signal that asked to stop, after a checkpoint was saved.

        Raises:
            ValueError: when the gradient of the first steps is zero, so that nothing would be trained.
            FloatingPointError: when the loss or its gradient is no longer finite; the last checkpoint is from
                before, and the batch that did it is kept.
        """
        left = self.config.max_steps - self.progress.step
        idle = IdleRun(self.accelerator.unwrap_model(self.model), steps=max(1, min(3, left)))
        with StopRequest() as request, logging_redirect_tqdm(), self._progress_bar() as bar:
            batches, throughput = iter(self._stream()), Throughput()
            while self.progress.step < self.config.max_steps:
                with throughput.step():
                    grad_norm = self._next_step(batches, throughput)
                idle.add(grad_norm)
                bar.update()
                stop = self._agree_to_stop(request)
                if self._due(self.config.log_every):
                    self._log(grad_norm, throughput)
                if not stop and self.task.sampling.every and self._due(self.task.sampling.every):
                    with self._checkpoint_if_failing():
                        stop = self._save_samples(request)
                if stop or self._due(self.config.checkpoint_every):
                    self._save_checkpoint()
                if stop:
                    name = signal.Signals(stop).name
                    logger.info("stopped by %s: --resume latest goes on", name)
                    self._end_trackers()
                    return stop
        self._save_pipeline()
        self._end_trackers()
        return 0

    def _end_trackers(self) -> None:
        # accelerate's end_training ends the group of processes too, which goes on to a report in linearize.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.max_steps

    def _stream(self) -> SampleStream:
        return SampleStream(
            self.source,
            self.share,
            range(self.progress.step, self.config.max_steps),
            seed=self.config.seed,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            unreadable=self.progress.unreadable,
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps,
            initial=self.progress.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )

    def _next_step(
        self, batches: Iterator[tuple[list[int], dict[str, Any]]], throughput: Throughput
    ) -> Tensor | None:
        """Take or skip an optimizer step; returns what :meth:`_step` does."""
        if self.progress.step + 1 not in self.config.skip_steps:
            return self._step(batches, throughput)
        for _ in range(self.share.micro_batches):
            next(batches)
        self.lr_scheduler.step()
        self.progress.skip()
        logger.warning("skipped step %d, as trainer.skip_steps asks", self.progress.step)
        return None

    def _step(self, batches: Iterator[tuple[list[int], dict[str, Any]]], throughput: Throughput) -> Tensor:
        """Take one optimizer step; returns the norm of the gradient before it was clipped."""
        max_norm = self.config.max_grad_norm or math.inf
        self.objective.step = self.progress.step
        losses = []
        for _ in range(self.share.micro_batches):
            with throughput.waiting():
                batch = next(batches)
            with self.accelerator.accumulate(self.model):
                loss = self._loss(*batch)
                losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                    grad_norm = gathered(grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.ema.step(self._parameters())
        loss = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        # A gradient that is not finite is a matter of course in fp16: its scaler leaves the step out.
        plain = self.config.mixed_precision != "fp16" and type(grad_norm) is Tensor
        self.progress.add(loss, grad_norm if plain else None)
        return grad_norm

    def _loss(self, numbers: list[int], batch: dict[str, Any]) -> Tensor:
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        generators = [sample_generator(self.config.seed, number, FOR_LOSS) for number in numbers]
        conditioning = self.task.conditioning.arguments(batch, generators)
        return self.objective.loss(self.model, batch["samples"], conditioning, generators).mean()

    def _agree_to_stop(self, request: StopRequest) -> int:
        """Return the signal that any process received, as all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return request.signal
        signals = torch.tensor([request.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(signals).max())

    def _log(self, grad_norm: Tensor | None, throughput: Throughput) -> None:
        self._require_finite()
        steps_per_second, waiting = throughput.take()
        values = {
            "loss": self.progress.mean_loss(),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": math.nan if grad_norm is None else float(grad_norm),
            "samples_per_second": steps_per_second * self.config.batch_size,
            "waiting_for_data": waiting,
        }
        self.progress.start_interval()
        if self.accelerator.is_main_process:
            step = self.progress.step
            line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d  %s", step, line)
            self.metrics.append({"step": step, **values})
        self.accelerator.log(values, step=self.progress.step)

    def _require_finite(self) -> None:
        """Check the steps since the last time; all processes find the same."""
        if step := self.progress.first_not_finite():
            refuse_step(self.output_dir, self.source, self.share, step, seed=self.config.seed)

    @contextmanager
    def _averaged_weights(self) -> Iterator[Any]:
        """Give the model with the averaged weights, in eval mode, inside the with block."""
        reshard(self.model)
        parameters = self._parameters()
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.model.eval()
        try:
            yield self.accelerator.unwrap_model(self.model)
        finally:
            reshard(self.model)
            self.ema.restore(parameters)
            self.model.train()

    @contextmanager
    def _checkpoint_if_failing(self) -> Iterator[None]:
        """Save a checkpoint before an error goes on, so that what is no step of training costs none."""
        try:
            yield
        except Exception:
            if self.accelerator.num_processes == 1:  # the others may wait for something else
                self._save_checkpoint()
            raise

    def _save_samples(self, request: StopRequest) -> int:
        """Write a sheet of samples, unless a signal comes meanwhile, which is returned."""
        with self._averaged_weights() as model:
            sample = partial(self.task.sample, model, self.accelerator.device, self.sheet_clock)
            # One of several processes must not leave the others alone in a sharded model.
            sheet = request.interruptible(sample) if self.accelerator.num_processes == 1 else sample()
        self.sheet_clock.end()
        if sheet is None:
            return request.signal
        if self.accelerator.is_main_process:
            sheet.save(self.output_dir / "samples" / f"step-{self.progress.step:08d}")
        sheet.log(self.accelerator.trackers, self.progress.step)
        return 0

    def _save_checkpoint(self) -> None:
        self._require_finite()  # never over good checkpoints with weights that are not finite
        # Each process reads samples of its own, and the first one writes what it knows.
        self.progress.unreadable.update(gather_object([*self.progress.unreadable.items()]))
        folder = checkpoints.checkpoint_folder(self.output_dir, self.progress.step)
        temporary = in_first_process(lambda: start_writing(folder))
        try:
            with disk_errors(folder):
                self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            in_first_process(lambda: self._finish_checkpoint(temporary, folder))
        except BaseException:
            shutil.rmtree(temporary.parent, ignore_errors=True)
            raise

    def _finish_checkpoint(self, temporary: Path, folder: Path) -> None:
        config, processes = as_dict(self.run_config), self.accelerator.num_processes
        checkpoints.write_record(temporary, config=config, num_processes=processes, data=self.fingerprint)
        commit(temporary, folder)
        checkpoints.keep_latest(self.output_dir, self.config.keep_checkpoints)
        logger.info("saved %s", folder)

    def _load(self, checkpoint: Path) -> None:
        """Restore everything that the next step depends on."""
        before, now = checkpoints.saved_num_processes(checkpoint), self.accelerator.num_processes
        checkpoints.require_same_data(checkpoint, as_dict(self.run_config), self.fingerprint)
        checkpoints.require_loadable(checkpoint, self.accelerator.process_index)
        with checkpoints.read_errors(checkpoint):
            self.accelerator.load_state(str(checkpoint))
        # Counts forward passes, of which a step may have others now; a checkpoint ends a step.
        self.accelerator.step = 0
        # The next step's by the schedule of now, which may be longer: the optimizer's is from the checkpoint.
        rates = [rate(self.lr_scheduler.last_epoch) for rate in self.lr_scheduler.lr_lambdas]
        groups = zip(self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.base_lrs, rates, strict=True)
        for group, highest, rate in groups:
            group["lr"] = highest * rate
        self.ema.to(self.accelerator.device)
        self._warn_of_schedule(checkpoints.saved_config(checkpoint)["trainer"]["max_steps"])
        if before != now:
            logger.warning(
                "resumed on %d processes instead of %d: dropout inside the model draws other numbers",
                now,
                before,
            )
        logger.info("resumed from %s", checkpoint)

    def _warn_of_schedule(self, before: int) -> None:
        """Say so where the learning rate of the steps behind would be another by the number of steps now."""
        optim, now, step = self.config.optimizer, self.config.max_steps, self.progress.step
        if before == now or not optim.depends_on_end:
            return
        rate = optim.learning_rate * self.lr_scheduler.lr_lambdas[0](step)
        logger.warning(
            "trainer.max_steps was %d and is %d: the schedule %s goes on as one of %d steps, at a rate of "
            "%.3g after one of %.3g; begin anew for the rates of a run of that length",
            before, now, optim.schedule, now, rate, self.lr_scheduler.get_last_lr()[0],
        )  # fmt: skip

    def _save_pipeline(self) -> None:
        """Write pipeline/ with the averaged weights."""
        unreadable = len(self.progress.unreadable)  # of all processes, as the last step has a checkpoint
        if unreadable and self.accelerator.is_main_process:
            logger.warning("%d samples could not be read and were skipped", unreadable)
        with self._averaged_weights() as model:
            weights = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                # A copy in one piece, as the trained model may be sharded. The weights are views: copy now.
                whole = type(model).from_config(model.config)
                set_trainable(whole, self.run_config.trainable, self.run_config.lora)
                whole.load_state_dict(weights)
                self._save_adapters(whole)
                merge_adapters(whole)
        folder, sheets = self.output_dir / "pipeline", sorted(self.output_dir.glob("samples/step-*.png"))
        picture = sheets[-1] if sheets else None
        facts = run_facts(
            self.run_config, len(self.source), self.progress.step, self.objective.facts(),
            data=self.fingerprint, num_unreadable=unreadable,
        )  # fmt: skip
        in_first_process(
            lambda: write_folder(folder, lambda path: self.task.save_pipeline(whole, path, facts, picture))
        )
        logger.info("saved %s", folder)

    def _save_adapters(self, model: Any) -> None:
        """Write lora/, for a run with adapters."""
        lora, folder = self.run_config.lora, self.output_dir / "lora"
        if lora.rank:
            write_folder(folder, lambda path: save_adapters(model, lora, path))
            logger.info("saved %s", folder)

    def _parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained ones, which are those that are averaged."""
        model = self.accelerator.unwrap_model(self.model)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
