"""Images from every source, and what is said of those that cannot be used."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN
from PIL import Image

from mhla_diffusion.training import DataConfig
from mhla_diffusion.training.data import ImageSamples, open_images
from mhla_diffusion.training.data.image_sources import find_column, read_column, sizes_of
from mhla_diffusion.training.data.stream import UnreadableSampleError

GENERATOR = torch.Generator


def samples(config: DataConfig, *, channels: int = 1, size: int = 8) -> ImageSamples:
    return ImageSamples(open_images(config), channels=channels, sizes=[(size, size)], flip=config.flip)


def test_class_folders_of_mixed_sizes(image_folder: Path) -> None:
    source = samples(DataConfig("folder", str(image_folder)))
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 20
    items = [source.load(index, GENERATOR()) for index in range(20)]
    assert [item["class_labels"] for item in items] == [0] * 10 + [1] * 10
    for item in items:
        assert item["samples"].shape == (1, 8, 8)
        assert item["samples"].dtype == torch.float32
        assert -1 <= item["samples"].min() < item["samples"].max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_channels_of_the_model(tmp_path: Path, channels: int) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (16, 8), (255, 0, 0)).save(tmp_path / "a" / "red.png")
    item = samples(DataConfig("folder", str(tmp_path)), channels=channels).load(0, GENERATOR())["samples"]
    expected = torch.tensor([1.0, -1.0, -1.0]) if channels == 3 else torch.tensor([76 / 127.5 - 1])
    torch.testing.assert_close(item, expected.view(-1, 1, 1).expand(channels, 8, 8))


def test_the_crop_is_central_and_the_flip_is_drawn_from_the_generator(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, 2] = 255  # the leftmost column that a central crop to 4 keeps
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "line.png")
    source = samples(DataConfig("folder", str(tmp_path), flip=True), size=4)
    seen = set()
    for seed in range(20):
        image = source.load(0, GENERATOR().manual_seed(seed))["samples"]
        again = source.load(0, GENERATOR().manual_seed(seed))["samples"]
        assert torch.equal(image, again)
        seen.add(int(image[0, 0].argmax()))
    assert seen == {0, 3}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_idx_files_packed_or_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([2, 0, 1, 2]))
    source = samples(DataConfig("idx", str(tmp_path)))
    item = source.load(2, GENERATOR())
    assert (len(source), item["class_labels"], source.class_names) == (4, 1, ["0", "1", "2"])
    torch.testing.assert_close(item["samples"][0], torch.tensor(pixels[2] / 127.5 - 1, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte does not exist, nor t10k-images"):
        DataConfig("idx", str(tmp_path), split="test").open()
    with pytest.raises(ValueError, match=r"data.split of idx files is train or test, got 'all'"):
        DataConfig("idx", str(tmp_path), split="all").open()
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte is no idx file of bytes, or not whole"):
        DataConfig("idx", str(tmp_path)).open()


def test_a_truncated_file_is_named(image_folder: Path) -> None:
    path = image_folder / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    source = samples(DataConfig("folder", str(image_folder)))
    with pytest.raises(UnreadableSampleError, match=r"cat/3\.png: "):
        source.load(3, GENERATOR())
    path.write_text("no image")
    with pytest.raises(UnreadableSampleError, match=r"cat/3\.png: cannot identify"):
        source.load(3, GENERATOR())


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_images(DataConfig("folder", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="one subfolder per class, each with images"):
        open_images(DataConfig("folder", str(tmp_path)))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="Found no valid file for the classes cat"):
        open_images(DataConfig("folder", str(tmp_path)))


@pytest.mark.parametrize("label_key", ["labels", "arr_1"])
def test_npz(tmp_path: Path, label_key: str) -> None:
    images = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    np.savez(tmp_path / "images.npz", arr_0=images, **{label_key: np.array([2, 0, 1])})
    source = samples(DataConfig("npz", str(tmp_path / "images.npz")), channels=3)
    assert source.class_names == ["0", "1", "2"]
    item = source.load(0, GENERATOR())
    assert item["class_labels"] == 2
    torch.testing.assert_close(item["samples"], torch.tensor(images[0]).permute(2, 0, 1) / 127.5 - 1)


def test_npz_of_another_form(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    with pytest.raises(ValueError, match="does not exist"):
        open_images(DataConfig("npz", str(path)))
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold arr_0 and labels \(or arr_1\), it holds images"):
        open_images(DataConfig("npz", str(path)))
    np.savez(path, arr_0=np.zeros((3, 8, 8)), labels=np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="images must be uint8"):
        open_images(DataConfig("npz", str(path)))
    np.savez(path, arr_0=np.zeros((3, 8, 8), dtype=np.uint8), labels=np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="labels must be 3 integers"):
        open_images(DataConfig("npz", str(path)))


def test_mnist_is_scaled_to_the_size_of_the_model() -> None:
    source = samples(DataConfig("mnist"), size=24)
    assert len(source) == 5000
    assert source.class_names == [str(digit) for digit in range(10)]
    image = source.load(0, GENERATOR())["samples"]
    assert image.shape == (1, 24, 24)
    assert (image[:, 0] == -1).all()
    assert image.max() > 0.8


@pytest.mark.parametrize("saved", ["save_to_disk", "image folder"])
def test_hugging_face(tmp_path: Path, image_folder: Path, saved: str) -> None:
    path = image_folder
    if saved == "save_to_disk":
        import datasets

        path = tmp_path / "saved"
        datasets.Dataset.from_dict(
            {
                "picture": [Image.new("L", (8, 8), value) for value in (0, 255)],
                "kind": ["warm", "cold"],
            },
            features=datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")}),
        ).save_to_disk(path)
        source = samples(DataConfig("huggingface", str(path), label_column="kind"))
        assert source.class_names == ["cold", "warm"]
        assert source.load(0, GENERATOR())["class_labels"] == 1
        assert (source.load(1, GENERATOR())["samples"] == 1).all()
        with pytest.raises(ValueError, match=r"has no ClassLabel column: set data\.label_column to one of"):
            samples(DataConfig("huggingface", str(path)))
        with pytest.raises(ValueError, match=r"has no pic: set data\.image_column to one of picture, kind"):
            samples(DataConfig("huggingface", str(path), image_column="pic", label_column="kind"))
    else:
        source = samples(DataConfig("huggingface", str(path)))
        assert source.class_names == ["cat", "dog"]
        labels = [source.load(index, GENERATOR())["class_labels"] for index in range(20)]
        assert sorted(labels) == [0] * 10 + [1] * 10


def test_columns_of_a_dataset_are_chosen_and_not_guessed(tmp_path: Path) -> None:
    import datasets

    pictures = [Image.new("L", (8, 8), 9), None, Image.fromarray(np.full((8, 8), 40_000, np.uint16))]
    features = {name: datasets.Image() for name in ("first", "second")}
    labels, text = datasets.ClassLabel(names=["cat", "dog"]), datasets.Value("string")
    rows = datasets.Dataset.from_dict(
        {"first": pictures, "second": pictures, "label": [1, 0, 1], "list": [["a"], ["b"], []]},
        features=datasets.Features({**features, "label": labels, "list": datasets.List(text)}),
    )
    rows.save_to_disk(tmp_path / "rows")
    config = partial(DataConfig, "huggingface", str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"has several: set data\.image_column to one of first, second"):
        samples(config())
    with pytest.raises(ValueError, match=r"the column list holds neither numbers nor names: set data\.label"):
        samples(config(image_column="first", label_column="list"))
    with pytest.raises(ValueError, match=r"the column label holds no images: set data\.image_column"):
        samples(config(image_column="label", label_column="label"))
    source = samples(config(image_column="first"))
    sample = source.load(2, GENERATOR())  # 16 bits, not clipped at 255
    assert sample["class_labels"] == 1
    assert sample["samples"].mean().item() == pytest.approx((40_000 >> 8) / 127.5 - 1, abs=1e-5)


def test_no_program_is_run_and_no_pipe_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.avif")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "drawing.eps")
    (tmp_path / "cat" / "drawing.eps").rename(tmp_path / "cat" / "2.png")
    os.mkfifo(tmp_path / "cat" / "3.png")
    source = samples(DataConfig("folder", str(tmp_path)))
    assert len(source) == 4
    for index in (0, 1):
        source.load(index, GENERATOR())
    for index, message in ((2, "cannot identify image file"), (3, "is no regular file")):
        with pytest.raises(UnreadableSampleError, match=message):
            source.load(index, GENERATOR())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "folder"}, r"data\.source folder needs data\.path"),
        ({"source": "mnist", "path": "x"}, r"data\.path is for data\.source folder or .* alone"),
        (
            {"source": "npz", "path": "x", "split": "test"},
            r"data\.split is for data\.source .*huggingface",
        ),
        (
            {"source": "latents", "path": "x", "flip": True},
            r"data\.flip is for data\.source",
        ),
    ],
)
def test_settings_that_do_not_belong_together(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**arguments)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A wide, a tall and a small image, and captions."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number, size in enumerate([(40, 20), (18, 36), (6, 6)]):
        Image.new("RGB", size, (255, 0, 0)).save(folder / f"{number}.png")
    rows = "".join(f"{n}.png,{text}\n" for n, text in enumerate(["wide", "tall", "small"]))
    (folder / "captions.csv").write_text("path,caption\n" + rows)
    return folder


def captioned_samples(config: DataConfig) -> ImageSamples:
    images = open_images(config, captioned=True)
    return ImageSamples(
        images, channels=3, sizes=sizes_of(config, (8, 8)), flip=config.flip, enlarge=config.enlarge
    )


def test_mirrored_pictures_whose_captions_name_a_side_are_told(
    captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig("folder", str(captioned), flip=True)
    captioned_samples(config)
    assert not caplog.records
    path = captioned / "captions.csv"
    path.write_text(path.read_text().replace("tall", "a dog on the LEFT").replace("small", "leftover rights"))
    captioned_samples(dataclasses.replace(config, flip=False))
    assert not caplog.records
    captioned_samples(config)
    assert "1 of 3 captions seem to name a side, first 'a dog on the LEFT'" in caplog.text


def test_captioned_images_go_to_the_size_of_their_shape(
    captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = ((16, 16), (8, 24), (24, 8))
    source = captioned_samples(DataConfig("folder", str(captioned), sizes=sizes))
    assert source.buckets == [1, 2, 0]
    items = [source.load(index, GENERATOR()) for index in range(3)]
    assert [item["caption"] for item in items] == ["wide", "tall", "small"]
    assert [tuple(item["samples"].shape) for item in items] == [(3, 8, 24), (3, 24, 8), (3, 16, 16)]
    assert all((item["samples"][0] == 1).all() and (item["samples"][1:] == -1).all() for item in items)
    assert "1 of 3 images are smaller than the size they go to and are enlarged, first" in caplog.text
    assert "2.png ((6, 6) pixels for (16, 16)); data.enlarge false leaves them out" in caplog.text


def test_images_smaller_than_their_size_are_left_out_if_asked(captioned: Path) -> None:
    source = captioned_samples(DataConfig("folder", str(captioned), enlarge=False))
    assert source.load(0, GENERATOR())["samples"].shape == (3, 8, 8)
    with pytest.raises(
        UnreadableSampleError, match=r"2\.png: 6 x 6 pixels are fewer than the 8 x 8 it goes to"
    ):
        source.load(2, GENERATOR())


def test_sizes_are_those_that_the_pipelines_of_diffusers_round_to(captioned: Path) -> None:
    config = DataConfig("folder", str(captioned), aspect_ratios=512)
    sizes = sizes_of(config, (8, 8))
    assert {(512, 512), (256, 1024), (1024, 256)} <= set(sizes)
    assert PixArtImageProcessor.classify_height_width_bin(600, 400, ASPECT_RATIO_512_BIN) in sizes
    with pytest.raises(ValueError, match=r"data.aspect_ratios must be one of 256, .* 4096, got 300"):
        DataConfig("folder", str(captioned), aspect_ratios=300)
    with pytest.raises(ValueError, match=r"brings its own sizes: remove data\.sizes"):
        DataConfig("folder", str(captioned), aspect_ratios=512, sizes=((8, 8),))
    with pytest.raises(ValueError, match=r"data\.sizes must be pairs of height and width"):
        DataConfig("folder", str(captioned), sizes=((0, 8),))


def test_what_has_classes_alone_has_no_captions(tmp_path: Path, image_folder: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, int))
    for config in (DataConfig("mnist"), DataConfig("npz", str(tmp_path / "images.npz"))):
        with pytest.raises(ValueError, match="has classes and no captions, which models of texts need"):
            open_images(config, captioned=True)
    with pytest.raises(ValueError, match=r"no captions at .*captions.csv: .* or a .txt beside each file"):
        open_images(DataConfig("folder", str(image_folder)), captioned=True)
    with pytest.raises(ValueError, match=r"data\.source scene has captions and no classes"):
        open_images(DataConfig("scene"))


def test_hugging_face_rows_with_texts(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(), "id": datasets.Value("string"), "url": datasets.Value("string"),
            "texts": datasets.List(datasets.Value("string")),
            "often": datasets.List(datasets.Value("float32")), "more": {"alt": datasets.Value("string")},
        }
    )  # fmt: skip
    rows = [
        ["a", ["x", "y"], [1.0, 9.0], "p"], ["b", ["z"], [1.0], None], ["c", None, [], "q"],
    ]  # fmt: skip
    datasets.Dataset.from_list(
        [
            {
                "picture": Image.new("L", (10, 8)), "id": name, "url": name, "texts": texts, "often": often,
                "more": {"alt": alt},
            }
            for name, texts, often, alt in rows
        ],
        features=features,
    ).save_to_disk(tmp_path / "rows")  # fmt: skip
    config = DataConfig(
        "huggingface",
        str(tmp_path / "rows"),
        text_column="texts",
        weight_column="often",
        sizes=((8, 8), (8, 16)),
    )
    source = captioned_samples(config)
    assert source.captions == [{"x": 1.0, "y": 9.0}, "z", None]
    assert source.buckets == [0, 0, 0]
    drawn = [source.load(0, GENERATOR().manual_seed(seed))["caption"] for seed in range(50)]
    assert 35 < drawn.count("y") < 50
    with pytest.raises(UnreadableSampleError, match="row 2: no caption"):
        source.load(2, GENERATOR())
    nested = dataclasses.replace(config, text_column="more.alt", weight_column=None)
    assert captioned_samples(nested).captions == ["p", None, "q"]
    with pytest.raises(
        ValueError, match=r"no single column of texts: set data.text_column to one of picture"
    ):
        captioned_samples(dataclasses.replace(config, text_column=None))
    with pytest.raises(ValueError, match=r"row 0 of data\.text_column id: a caption is a text, or texts"):
        captioned_samples(dataclasses.replace(config, text_column="id"))


def test_tar_files_of_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    number = 0
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for _ in range(2):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (0, 50 * number, 0)).save(picture, "PNG")
                about = json.dumps({"alt": f"about {number}"}).encode()
                for ending, content in (
                    ("png", picture.getvalue()), ("txt", f"picture {number}".encode()), ("json", about),
                    ("cls", str(number % 2).encode()),
                ):  # fmt: skip
                    info = tarfile.TarInfo(f"{number:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    source = captioned_samples(DataConfig("webdataset", str(tmp_path)))
    assert [source.load(i, GENERATOR())["caption"] for i in range(4)] == [f"picture {i}" for i in range(4)]
    green = source.load(3, GENERATOR())["samples"][1].mean()
    assert green == pytest.approx(150 / 127.5 - 1)
    by_json = DataConfig("webdataset", str(tmp_path / "1.tar"), text_column="json.alt")
    assert captioned_samples(by_json).captions == ["about 2", "about 3"]
    labelled = samples(DataConfig("webdataset", str(tmp_path / "*.tar"), label_column="cls"), channels=3)
    assert (labelled.class_names, labelled.load(3, GENERATOR())["class_labels"]) == (["0", "1"], 1)
    with pytest.raises(ValueError, match="holds no tar files"):
        captioned_samples(DataConfig("webdataset", str(tmp_path / "cache")))
    (tmp_path / "bad.tar").write_text("no tar")
    with pytest.raises(ValueError, match=r"bad\.tar: "):
        captioned_samples(DataConfig("webdataset", str(tmp_path / "bad.tar")))


def test_images_have_1_or_3_channels(image_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.in_channels is 4; for latents"):
        samples(DataConfig("folder", str(image_folder)), channels=4)


def test_folders_that_systems_make_are_no_classes(image_folder: Path) -> None:
    before = open_images(DataConfig(source="folder", path=str(image_folder)))
    for name in (".ipynb_checkpoints", "@eaDir", f"{before.class_names[0]}/.ipynb_checkpoints"):
        folder = image_folder / name
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "copy.png")
    after = open_images(DataConfig(source="folder", path=str(image_folder)))
    assert after.class_names == before.class_names
    assert len(after) == len(before)


def test_columns_are_those_of_the_usual_name_and_parts_may_be_missing() -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["a", "b"])
    features = {"fine": label, "label": label, "more": {"alt": datasets.Value("string")}}
    values = {"fine": [0, 1], "label": [1, 0], "more": [{"alt": "x"}, None]}
    rows = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    assert find_column("rows", rows, "label_column", None, datasets.ClassLabel) == "label"
    assert read_column("rows", rows, "text_column", "more.alt") == ["x", None]
