"""Moving digits and films."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mhla_diffusion.training import DataConfig
from mhla_diffusion.training.data import (
    MovingDigitsConfig,
    VideoDataConfig,
    VideoSamples,
    open_images,
    open_videos,
)
from mhla_diffusion.training.data.toys import (
    COLOURS,
    COUNTS,
    PLACES,
    SHAPES,
    MovingDigits,
    Scene,
    ScenesConfig,
    all_scenes,
    direction,
)


def test_digits_move_the_way_the_caption_says() -> None:
    clips = MovingDigits(MovingDigitsConfig(digits=1, digit_size=20, num_clips=200), (64, 64))
    ways = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    checked = 0
    for number, caption in enumerate(clips.captions):
        frames = clips.read(number, length=2).astype(float)
        where = np.array(
            [[(f.sum(axis=1 - a) * np.arange(64)).sum() / f.sum() for a in (0, 1)] for f in frames]
        )
        if where.min() < 18 or where.max() > 45:
            continue  # it may bounce at once
        asked = sum(np.array(ways[word]) for word in caption.split("moving ")[1].split(" and "))
        moved = where[1] - where[0]
        assert asked @ moved / np.linalg.norm(asked) / np.linalg.norm(moved) > 0.85, caption
        checked += 1
    assert checked > 20


def test_without_bounce_a_digit_crosses_the_middle_as_the_caption_says() -> None:
    config = MovingDigitsConfig(digits=1, digit_size=16, speed=0.14, bounce=False, num_clips=64)
    clips, ways = MovingDigits(config, (24, 24)), set()
    for index, caption in enumerate(clips.captions):
        frames = clips.read(index, length=8).astype(float)
        axes = np.arange(24) - 11.5
        centres = np.stack([frames.sum(2) @ axes, frames.sum(1) @ axes], 1) / frames.sum((1, 2))[:, None]
        way = centres[-1] - centres[0]
        words = caption.split("moving ")[1]
        expected = [
            ("down" in words) - ("up" in words), ("right" in words) - ("left" in words)
        ]  # fmt: skip
        length = 7 * 0.14 * 8 / np.linalg.norm(expected)
        np.testing.assert_allclose(way, np.multiply(expected, length), atol=1.01)
        assert frames.sum((1, 2)).min() > 0.99 * frames.sum((1, 2)).max(), "never cut off"
        ways.add(words)
    assert len(ways) == 8


def test_two_digits_do_not_cross_the_middle() -> None:
    with pytest.raises(ValueError, match=r"moving_digits.digits must be 1 without bounce, got 2"):
        MovingDigitsConfig(bounce=False)


def test_digits_stay_whole_in_the_frame() -> None:
    clips = MovingDigits(MovingDigitsConfig(num_clips=3), (64, 64))
    assert clips.captions[0].count("digit") == 2
    frames = clips.read(0, length=20)
    assert (frames.shape, frames.dtype) == ((20, 64, 64), np.uint8)
    assert np.array_equal(frames, clips.read(0, length=20))
    assert not np.array_equal(frames, clips.read(1, length=20))
    # Whole digits in every frame: nothing is cut off at the edges.
    mass = frames.sum(axis=(1, 2)).astype(float)
    assert mass.min() > 0.5 * mass.max()


@pytest.mark.parametrize(
    ("angle", "name"),
    [(0, "right"), (np.pi / 2, "down"), (np.pi, "left"), (-np.pi / 4, "up and right"), (6.2, "right")],
)
def test_names_of_directions(angle: float, name: str) -> None:
    assert direction(angle) == name


def test_films_are_cut_into_captioned_clips() -> None:
    config = VideoDataConfig(source="films", frames=9, fps=8.0, sizes=((24, 32),))
    source = VideoSamples(open_videos(config), config, channels=3)
    assert len(source) == 10
    assert len(set(source.captions)) == 10
    sample = source.load(8, torch.Generator())
    assert sample["samples"].shape == (3, 9, 24, 32)
    assert "bow tie" in sample["caption"]


def test_what_is_held_out_leaves_every_pair_of_properties_in_training() -> None:
    kept, held = all_scenes(held_out=False), all_scenes(held_out=True)
    assert (len(kept), len(held)) == (216, 72)
    assert not set(kept) & set(held)
    names = [field.name for field in dataclasses.fields(Scene)]
    sizes = dict(zip(names, map(len, (COUNTS, COLOURS, SHAPES, PLACES)), strict=True))
    for first, second in itertools.combinations(names, 2):
        pairs = {(getattr(scene, first), getattr(scene, second)) for scene in kept}
        assert len(pairs) == sizes[first] * sizes[second]


def test_scenes_show_what_their_caption_says() -> None:
    images = open_images(DataConfig("scene", scenes=ScenesConfig(num_images=216)), captioned=True)
    for index in range(0, 216, 7):
        count, colour, shape, *place = str(images.captions and images.captions[index]).split()  # type: ignore[union-attr]
        pixels = np.asarray(images.read(index)).astype(int)
        assert np.array_equal(pixels, np.asarray(images.read(index)).astype(int))
        drawn = np.abs(pixels - np.array(COLOURS[colour])).sum(-1) < 12
        share = drawn.sum() / (COUNTS.index(count) + 1) / 32**2
        assert 0.012 < share < 0.06, (shape, share)
        row, column = np.argwhere(drawn).mean(0) / 32
        assert {"left": column < 0.36, "right": column > 0.6, "top": row < 0.36, "bottom": row > 0.6}[
            place[-1]
        ]


def test_the_quickstart_shows_as_many_scenes_that_were_trained_as_were_not() -> None:
    script = (Path(__file__).parents[3] / "scripts" / "quickstart.sh").read_text()
    prompts = script.partition("prompts.txt << end\n")[2].partition("\nend\n")[0].splitlines()
    kept, held = ({scene.caption for scene in all_scenes(held_out=held)} for held in (False, True))
    assert (len(prompts), len(set(prompts))) == (16, 16)
    assert set(prompts[:8]) <= kept
    assert set(prompts[8:]) <= held


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_images": 0}, "1 or more, got 0"), ({"side": 8}, "16 or more, got 8")]
)
def test_scenes_that_cannot_be_drawn_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScenesConfig(**settings)  # type: ignore[arg-type]
