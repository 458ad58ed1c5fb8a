"""The losses against what their equations say, worked out another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mhla_diffusion.training import DDPM, FlowMatching, ObjectiveConfig, build_objective
from mhla_diffusion.training.data.stream import FOR_LOSS, sample_generator
from mhla_diffusion.training.objectives.ddpm import discretized_gaussian_nll, normal_kl


class Recorder:
    """A model that returns what it is told and keeps what it was given."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, noisy: Tensor, *, timestep: Tensor, return_dict: bool, **conditioning: Tensor):
        self.noisy, self.timestep, self.conditioning = noisy, timestep, conditioning
        return (self.output,)


def samples_and_noise(channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = torch.rand(4, channels, 3, 3, generator=generator) * 2 - 1
    return samples, torch.randn(4, channels, 3, 3, generator=generator)


def test_flow_matching_interpolates_and_asks_for_the_velocity() -> None:
    samples, noise = samples_and_noise()
    times = torch.tensor([0.1, 0.4, 0.7, 1.0])
    model = Recorder(torch.zeros_like(samples))
    labels = torch.arange(4)
    loss = FlowMatching(ObjectiveConfig()).loss_at(
        model, samples, {"class_labels": labels}, times=times, noise=noise
    )
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(model.noisy[i], (1 - t) * samples[i] + t * noise[i])
        torch.testing.assert_close(loss[i], ((noise[i] - samples[i]) ** 2).mean())
    torch.testing.assert_close(model.timestep, 1000 * times)
    assert model.conditioning["class_labels"] is labels


def test_a_perfect_flow_model_has_no_loss_and_its_scheduler_recovers_the_sample() -> None:
    samples, noise = samples_and_noise()
    for shift in (1.0, 3.0):
        objective = FlowMatching(ObjectiveConfig(shift=shift))
        perfect = Recorder(noise - samples)
        loss = objective.loss_at(perfect, samples, {}, times=torch.full((4,), 0.3), noise=noise)
        assert loss.abs().max() == 0
        scheduler = objective.scheduler()
        assert scheduler.config.shift == shift
        scheduler.set_timesteps(5)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(noise - samples, t, x).prev_sample
        torch.testing.assert_close(x, samples, atol=1e-5, rtol=0)


def test_a_model_of_the_sample_has_the_loss_of_its_velocity() -> None:
    samples, noise = samples_and_noise()
    times = torch.tensor([0.1, 0.4, 0.7, 1.0])
    guess = torch.full_like(samples, 0.2)
    t = times.view(-1, 1, 1, 1)
    noisy = (1 - t) * samples + t * noise
    of_velocity = FlowMatching(ObjectiveConfig()).loss_at(
        Recorder((noisy - guess) / t), samples, {}, times=times, noise=noise
    )
    of_sample = FlowMatching(ObjectiveConfig(prediction_type="sample"))
    loss = of_sample.loss_at(Recorder(guess), samples, {}, times=times, noise=noise)
    torch.testing.assert_close(loss, of_velocity)
    near = of_sample.loss_at(Recorder(guess), samples, {}, times=torch.full((4,), 1e-3), noise=noise)
    torch.testing.assert_close(near, ((guess - samples) ** 2).mean((1, 2, 3)) / 0.1**2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_scheduler_of_a_model_of_the_sample_recovers_it(shift: float) -> None:
    samples, noise = samples_and_noise()
    scheduler = FlowMatching(ObjectiveConfig(prediction_type="sample", shift=shift)).scheduler()
    assert scheduler.config.flow_shift == shift
    scheduler.set_timesteps(5)
    x = noise
    for t in scheduler.timesteps:
        sigma = scheduler.sigmas[scheduler.step_index or 0]
        torch.testing.assert_close(x, (1 - sigma) * samples + sigma * noise, atol=2e-3, rtol=0)
        x = scheduler.step(samples, t, x).prev_sample
    torch.testing.assert_close(x, samples, atol=1e-5, rtol=0)


def test_logit_normal_times_and_their_shift() -> None:
    def draw(config: ObjectiveConfig) -> Tensor:
        objective = FlowMatching(config)
        return torch.cat([objective.draw_time(sample_generator(0, k, FOR_LOSS)) for k in range(4000)])

    times = draw(ObjectiveConfig(logit_mean=0.5, logit_std=0.8))
    logits = times.logit()
    assert logits.mean() == pytest.approx(0.5, abs=0.05)
    assert logits.std() == pytest.approx(0.8, abs=0.05)
    shifted = draw(ObjectiveConfig(logit_mean=0.5, logit_std=0.8, shift=3.0))
    torch.testing.assert_close(shifted, 3 * times / (1 + 2 * times))
    assert draw(ObjectiveConfig(weighting_scheme="none")).mean() == pytest.approx(0.5, abs=0.02)


def test_no_time_is_nearer_to_the_data_than_the_scheduler_goes() -> None:
    objective = FlowMatching(ObjectiveConfig(logit_mean=-20))
    assert float(objective.draw_time(sample_generator(0, 0, FOR_LOSS))) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_times_of_an_expert_are_those_of_its_part_that_are_drawn_without_it(name: Any) -> None:
    def draw(**settings: Any) -> Tensor:
        objective = build_objective(ObjectiveConfig(name=name, **settings))
        times = [objective.draw_time(sample_generator(0, k, FOR_LOSS)) for k in range(2000)]
        return objective.timestep(torch.cat(times)) / 1000

    whole, high, low = draw(), draw(times=(0.7, 1.0)), draw(times=(0.0, 0.7))
    assert high.min() >= 0.7 > low.max()
    assert torch.equal(high[whole >= 0.7], whole[whole >= 0.7]), "the first draw counts, where it can"
    assert high.mean() == pytest.approx(float(whole[whole >= 0.7].mean()), abs=0.01)
    assert low.mean() == pytest.approx(float(whole[whole < 0.7].mean()), abs=0.03)


def test_times_that_are_none_or_never_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.times must be two of 0 to 1, .* got \[0.9, 0.1\]"):
        ObjectiveConfig(times=(0.9, 0.1))
    objective = FlowMatching(ObjectiveConfig(times=(0.0, 0.0005)))
    with pytest.raises(ValueError, match=r"draws no times of objective.times \[0.0, 0.0005\]"):
        objective.draw_time(sample_generator(0, 0, FOR_LOSS))


def test_flow_weighting() -> None:
    samples, noise = samples_and_noise()
    times = torch.tensor([0.1, 0.4, 0.7, 1.0])

    def loss(scheme: str) -> Tensor:
        objective = FlowMatching(ObjectiveConfig(weighting_scheme=scheme))  # type: ignore[arg-type]
        return objective.loss_at(Recorder(torch.zeros_like(samples)), samples, {}, times=times, noise=noise)

    torch.testing.assert_close(loss("sigma_sqrt"), loss("none") / times**2)


def test_the_loss_of_a_sample_depends_on_its_own_generator_alone() -> None:
    samples, _ = samples_and_noise()
    for name, channels in (("flow", 2), ("ddpm", 4)):
        objective = build_objective(ObjectiveConfig(name=name))  # type: ignore[arg-type]

        def loss(rows: slice, objective=objective, channels=channels) -> Tensor:
            generators = [sample_generator(0, k, FOR_LOSS) for k in range(4)][rows]
            model = Recorder(torch.full((len(generators), channels, 3, 3), 0.1))
            return objective.loss(model, samples[rows], {}, generators)

        together = loss(slice(0, 4))
        apart = torch.cat([loss(slice(0, 1)), loss(slice(1, 4))])
        torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_a_second_model_can_be_asked_of_the_very_sample_that_the_loss_was_of(name: str) -> None:
    samples, _ = samples_and_noise()
    objective = build_objective(ObjectiveConfig(name=name))  # type: ignore[arg-type]
    student = Recorder(torch.full((4, objective.out_channels(2), 3, 3), 0.1))
    teacher = Recorder(torch.full((4, objective.out_channels(2), 3, 3), 0.2))
    labels = {"class_labels": torch.arange(4)}
    loss = objective.loss(student, samples, labels, [sample_generator(0, k, FOR_LOSS) for k in range(4)])
    times, noise = objective.draw(samples, [sample_generator(0, k, FOR_LOSS) for k in range(4)])
    target = objective.predict(teacher, objective.noisy(samples, times, noise), times, labels)
    assert torch.equal(teacher.noisy, student.noisy)
    assert torch.equal(teacher.timestep, student.timestep)
    assert torch.equal(target, teacher.output)
    assert torch.equal(objective.loss_of(student.output, samples, times=times, noise=noise), loss)


def ddpm_by_hand(x0: float, noise: float, t: int, eps: float, v: float) -> float:
    """One value's loss from the scalar chain, in float64, without any closed form of the posterior."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = math.prod((1 - betas[: t + 1]).tolist())
    bar_before = math.prod((1 - betas[:t]).tolist())
    beta = betas[t].item()
    xt = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise
    mse = (eps - noise) ** 2

    def posterior(start: float) -> tuple[float, float]:
        """Bayes: the prior N(sqrt(bar_before) x0, 1 - bar_before) times the likelihood of x_t."""
        precision = 1 / (1 - bar_before) + (1 - beta) / beta
        mean = math.sqrt(bar_before) * start / (1 - bar_before) + math.sqrt(1 - beta) * xt / beta
        return mean / precision, 1 / precision

    predicted = (xt - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    if t == 0:
        smallest = betas[1].item() * (1 - bar) / (1 - bar * (1 - betas[1].item()))
        std = math.exp(((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(smallest)) / 2)
        model = Normal(torch.tensor(predicted, dtype=torch.float64), std)
        mass = model.cdf(torch.tensor(x0 + 1 / 255)) - model.cdf(torch.tensor(x0 - 1 / 255))
        return mse - mass.log2().item()
    mean, variance = posterior(x0)
    model_mean, _ = posterior(predicted)
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(variance)
    kl = kl_divergence(
        Normal(torch.tensor(mean).double(), math.sqrt(variance)),
        Normal(torch.tensor(model_mean).double(), math.exp(log_variance / 2)),
    )
    return mse + kl.item() / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 17, 500, 999])
def test_ddpm_loss_is_that_of_the_scalar_chain(t: int) -> None:
    cases = [(0.3, 0.5, 0.45, -0.2), (-0.8, -1.2, -1.0, 0.9), (0.0, 0.1, 0.1, -1.0)]
    x0, noise, eps, v = (torch.tensor(column).view(-1, 1, 1) for column in zip(*cases, strict=True))
    model = Recorder(torch.cat((eps, v), dim=1))
    times = torch.full((3,), t)
    loss = DDPM().loss_at(model, x0, {}, times=times, noise=noise)
    for i, (x0_, noise_, eps_, v_) in enumerate(cases):
        assert loss[i].item() == pytest.approx(ddpm_by_hand(x0_, noise_, t, eps_, v_), rel=2e-3, abs=1e-4)
    assert model.timestep is times


def test_the_bound_trains_the_variance_alone() -> None:
    samples, noise = samples_and_noise()
    output = torch.full((4, 4, 3, 3), 0.2, requires_grad=True)
    times = torch.tensor([0, 3, 200, 900])
    DDPM().loss_at(Recorder(output), samples, {}, times=times, noise=noise).sum().backward()
    assert output.grad is not None
    expected = 2 * (0.2 - noise) / noise[0].numel()
    torch.testing.assert_close(output.grad[:, :2], expected)
    assert (output.grad[:, 2:] != 0).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddpm_noises_as_its_scheduler_does(schedule: Any) -> None:
    samples, noise = samples_and_noise()
    times = torch.tensor([0, 3, 200, 999])
    model = Recorder(torch.zeros(4, 4, 3, 3))
    objective = DDPM(ObjectiveConfig(name="ddpm", beta_schedule=schedule, beta_start=0.00085, beta_end=0.018))
    assert objective.scheduler().config.beta_schedule == schedule
    objective.loss_at(model, samples, {}, times=times, noise=noise)
    torch.testing.assert_close(model.noisy, objective.scheduler().add_noise(samples, noise, times))


def test_kl_and_nll_in_nats() -> None:
    mean1, log_var1, mean2, log_var2 = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    exact = kl_divergence(Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, log_var1, mean2, log_var2), exact)
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_std in ((0.0, -1.0), (0.95, -3.0), (-1.2, 0.5)):
        mass = (-discretized_gaussian_nll(bins, torch.tensor(mean), torch.tensor(log_std))).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_scheduler_of_ddpm_lets_latents_be_as_large_as_they_are() -> None:
    samples, noise = samples_and_noise()
    scheduler = DDPM().scheduler()
    scheduler.set_timesteps(10)
    x = scheduler.add_noise(3 * samples, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t]
        x = scheduler.step((x - alpha.sqrt() * 3 * samples) / (1 - alpha).sqrt(), t, x).prev_sample
    torch.testing.assert_close(x, 3 * samples, atol=1e-3, rtol=0)


def test_which_channels_each_objective_needs() -> None:
    assert FlowMatching(ObjectiveConfig()).out_channels(4) == 4
    assert DDPM().out_channels(4) == 8


def test_settings_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"objective\.shift is for objective\.name flow alone"):
        ObjectiveConfig(name="ddpm", shift=3.0)
    with pytest.raises(ValueError, match=r"logit_std must be positive and finite, got 0"):
        ObjectiveConfig(logit_std=0.0)
    with pytest.raises(ValueError, match=r"objective\.beta_end is for objective\.name ddpm alone"):
        ObjectiveConfig(beta_end=0.03)
    with pytest.raises(ValueError, match=r"above 0, below 1 and in this order, got 0.03 and 0.02"):
        ObjectiveConfig(name="ddpm", beta_start=0.03)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_noise_is_read_back_from_what_a_perfect_model_returns(kind: Any) -> None:
    samples, noise = samples_and_noise()
    objective = DDPM(ObjectiveConfig(name="ddpm", prediction_type=kind))
    times = torch.tensor([3, 50, 200, 900])
    target, noisy = objective._target(samples, times, noise), objective.noisy(samples, times, noise)
    torch.testing.assert_close(objective._eps(target, noisy, times), noise, atol=1e-3, rtol=0)


def test_times_that_are_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.times must be two of 0 to 1, in this order"):
        ObjectiveConfig(times=(0.5, 0.5))
