"""Frames of every container and codec that FFmpeg writes here, against its own decoding of the whole file."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_diffusion.files import video_index
from mhla_diffusion.files.clips import choose_clip
from mhla_diffusion.files.video_packets import OpenVideo
from mhla_diffusion.files.videos import (
    VIDEO_EXTENSIONS,
    Decoder,
    UnreadableVideoError,
    VideoReader,
    open_video,
)

pytest.importorskip("av")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

COUNT, HEIGHT, WIDTH = 40, 48, 64
X265 = "keyint=10:min-keyint=10:scenecut=0:bframes=4:b-adapt=0:log-level=error:pools=1"
CODECS = {
    "h264": "-c:v libx264 -g 10 -pix_fmt yuv420p",
    "h264_no_b": "-c:v libx264 -g 10 -bf 0 -pix_fmt yuv420p",
    "h264_open": "-c:v libx264 -g 10 -x264-params open-gop=1:b-adapt=0:scenecut=0 -pix_fmt yuv420p",
    "h264_refresh": "-c:v libx264 -g 10 -x264-params intra-refresh=1 -pix_fmt yuv420p",
    "h264_interlaced": "-c:v libx264 -g 10 -flags +ilme+ildct -x264-params interlaced=1 -pix_fmt yuv420p",
    "hevc": f"-c:v libx265 -x265-params {X265} -pix_fmt yuv420p",
    "hevc_closed": f"-c:v libx265 -x265-params {X265}:open-gop=0 -pix_fmt yuv420p",
    "hevc_default": "-c:v libx265 -x265-params log-level=error:pools=1 -pix_fmt yuv420p",
    "mpeg4": "-c:v mpeg4 -g 10 -pix_fmt yuv420p",
    "mpeg4_b": "-c:v mpeg4 -g 10 -bf 2 -pix_fmt yuv420p",
    "xvid_b": "-c:v libxvid -g 10 -bf 2 -pix_fmt yuv420p",
    "mpeg2": "-c:v mpeg2video -g 10 -pix_fmt yuv420p",
    "mpeg2_b": "-c:v mpeg2video -g 10 -bf 2 -pix_fmt yuv420p",
    "mpeg1_b": "-c:v mpeg1video -g 10 -bf 2 -pix_fmt yuv420p",
    "msmpeg4": "-c:v msmpeg4 -g 10 -pix_fmt yuv420p",
    "wmv2": "-c:v wmv2 -g 10 -pix_fmt yuv420p",
    "vp8": "-c:v libvpx -g 10 -cpu-used 4 -pix_fmt yuv420p",
    "vp9": "-c:v libvpx-vp9 -g 20 -lag-in-frames 16 -auto-alt-ref 1 -cpu-used 5 -pix_fmt yuv420p",
    "av1": "-c:v libaom-av1 -g 10 -cpu-used 8 -pix_fmt yuv420p",
    "svtav1": "-c:v libsvtav1 -g 10 -preset 12 -svtav1-params lp=1 -pix_fmt yuv420p",
    "vvc": "-c:v libvvenc -pix_fmt yuv420p",
    "theora": "-c:v libtheora -g 10 -q:v 7 -pix_fmt yuv420p",
    "flv1": "-c:v flv -g 10 -pix_fmt yuv420p",
    "h263p": "-c:v h263p -g 10 -pix_fmt yuv420p",
    "mjpeg": "-c:v mjpeg -pix_fmt yuvj420p",
    "prores": "-c:v prores",
    "ffv1": "-c:v ffv1 -g 10 -pix_fmt yuv420p",
    "huffyuv": "-c:v huffyuv",
    "png": "-c:v png",
    "qtrle": "-c:v qtrle -g 10",
    "default": "",
}
CONTAINERS = {
    "mp4": "h264 h264_no_b h264_open h264_refresh h264_interlaced hevc hevc_closed hevc_default mpeg4 "
    "mpeg4_b xvid_b mpeg2_b vp9 av1 svtav1",
    "mov": "h264_open hevc mpeg4_b mjpeg prores qtrle",
    "mkv": "h264 h264_open hevc mpeg4_b mpeg2 mpeg2_b mpeg1_b vp8 vp9 ffv1 huffyuv theora vvc",
    "avi": "h264 h264_no_b h264_open mpeg4 mpeg4_b xvid_b mpeg2_b msmpeg4 wmv2 vp8 mjpeg ffv1 huffyuv "
    "h263p png",
    "ts": "h264 h264_open h264_refresh h264_interlaced hevc mpeg2_b mpeg4_b",
    "mpg": "mpeg1_b mpeg2_b h264_open",
    "webm": "vp8 vp9 av1",
    "flv": "h264_open flv1",
    "ogv": "theora vp8",
    "wmv": "wmv2 h264_open",
    "3gp": "h264 mpeg4",
    "mxf": "mpeg2_b",
    "gif": "default",
    "apng": "default",
    "h264": "h264_open",
}
ENCODED = [f"{codec}.{container}" for container, codecs in CONTAINERS.items() for codec in codecs.split()]
# What is made of these without encoding: a part of them, as people cut films.
CUT = [
    f"{codec}.{container}"
    for container in ("mp4", "mov", "mkv", "avi", "ts", "mpg", "flv")
    for codec in ("h264_open", "hevc", "mpeg4_b", "mpeg2_b")
    if codec in CONTAINERS[container].split()
]
CUTS = {"cut": ("-ss", "0.7"), "part": ("-ss", "0.5", "-t", "0.7")}
GLUED = ("h264_open.mp4", "hevc.mp4", "h264_open.ts", "mpeg4_b.avi")
MADE = [*ENCODED, *(f"{cut}-{name}" for cut in CUTS for name in CUT), *(f"glued-{name}" for name in GLUED)]

DECORD = ["h264", "h264_no_b", "h264_interlaced", "hevc_closed", "hevc_default"]
DECORD = [*(f"{codec}.mp4" for codec in DECORD), "h264.3gp", "h264.mkv"]


def numbered_frames() -> np.ndarray:
    """Frames uint8 ``[40, 48, 64, 3]`` of a moving texture, with their numbers in six blocks, one a bit."""
    texture = np.random.default_rng(5).integers(40, 90, (HEIGHT + COUNT, WIDTH + COUNT, 3), dtype=np.uint8)
    frames = np.stack([texture[i // 2 : i // 2 + HEIGHT, i : i + WIDTH] for i in range(COUNT)])
    for i, frame in enumerate(frames):
        for bit in range(6):
            row, column = divmod(bit, 3)
            frame[4 + 20 * row : 20 + 20 * row, 4 + 20 * column : 20 + 20 * column] = (
                235 if i >> bit & 1 else 16
            )
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that are drawn in frames."""
    centres = [divmod(bit, 3) for bit in range(6)]
    blocks = np.stack(
        [frames[:, 8 + 20 * r : 16 + 20 * r, 8 + 20 * c : 16 + 20 * c].mean((1, 2, 3)) for r, c in centres]
    )
    return [int(number) for number in ((blocks > 128) << np.arange(6)[:, None]).sum(0)]


def ffmpeg(*arguments: str, data: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-threads", "1", "-y", *arguments]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def encode(path: Path, *options: str, rate: str = "25") -> None:
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", "-")
    ffmpeg(*source, *options, str(path), data=numbered_frames().tobytes())


def decode_whole(path: Path) -> np.ndarray:
    """What FFmpeg makes of a file: every frame that it shows."""
    options = ("-map", "0:v:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(ffmpeg("-i", str(path), *options), np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


class Zoo:
    """Videos made by FFmpeg when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = cache(self._make)

    def _make(self, name: str) -> Path:
        path = self.folder / name
        kind, _, source = name.rpartition("-")
        if kind in CUTS:
            ffmpeg(*CUTS[kind], "-i", str(self.path(source)), "-c", "copy", str(path))
        elif kind == "glued":
            parts = self.folder / f"{name}.txt"
            parts.write_text(f"file '{self.path(f'cut-{source}').name}'\n" * 2)
            ffmpeg("-f", "concat", "-i", str(parts), "-c", "copy", str(path))
        else:
            encode(path, *CODECS[path.stem].split())
        return path


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def assert_same(got: np.ndarray, expected: np.ndarray, *, interlaced: bool = False) -> None:
    """Equal but for the colours of interlaced frames, which FFmpeg's program interpolates field by field."""
    difference = np.abs(got.astype(int) - expected).max(axis=(1, 2, 3))
    assert difference.max() <= (48 if interlaced else 2), (numbers(got), numbers(expected), difference)


@pytest.mark.parametrize("name", MADE)
def test_frames_are_those_of_decoding_the_whole_file(zoo: Zoo, name: str) -> None:
    path, damaged = zoo.path(name), BORN_DAMAGED.get(name, range(0))
    assert_reads_frames(
        open_video(path), decode_whole(path), interlaced="interlaced" in name, damaged=damaged
    )


# FFmpeg writes a key picture that its own decoder cannot read.
BORN_DAMAGED = {"xvid_b.mp4": range(20, 29)}


def assert_reads_frames(
    reader: VideoReader, whole: np.ndarray, *, interlaced: bool, damaged: range = range(0)
) -> None:
    count = len(whole)
    assert reader.num_frames == count > 8
    random = np.random.default_rng(0)
    clips = [range(0, count, stride) for stride in (1, 2, 4, 8)]
    for stride in (1, 2, 4, 8):
        first = int(random.integers(count))
        clips.append(range(first, min(count, first + 4 * stride), stride))
    clips.append(random.permutation(count)[:4].tolist())
    for clip in clips:
        if set(damaged) & set(clip):
            with pytest.raises(UnreadableVideoError, match=r"is damaged: frame 2\d is not what"):
                reader.read(clip)
            clip = [index for index in clip if index not in damaged] or [0]
        assert_same(reader.read(clip), whole[list(clip)], interlaced=interlaced)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What decord is asked for, while it answers."""
    decord = pytest.importorskip("decord")
    asked: list[list[int]] = []
    get_batch = decord.VideoReader.get_batch

    def noted(reader: object, indices: list[int]) -> object:
        asked.append(indices)
        return get_batch(reader, indices)

    monkeypatch.setattr(decord.VideoReader, "get_batch", noted)
    return asked


@pytest.mark.parametrize("name", DECORD)
def test_decord_reads_plain_files_as_the_whole_file_is_decoded(
    zoo: Zoo, name: str, batches: list[list[int]]
) -> None:
    path = zoo.path(name)
    assert_reads_frames(open_video(path, decoder="decord"), decode_whole(path), interlaced=False)
    assert len(batches) == 9
    assert list(range(0, COUNT, 8)) in batches


@pytest.mark.parametrize("name", sorted(set(MADE) - set(DECORD)))
def test_decord_is_refused_where_it_is_not_proven_right(
    zoo: Zoo, name: str, batches: list[list[int]]
) -> None:
    with pytest.raises(UnreadableVideoError, match=f"{name}: decord would not .* decoder 'auto' or 'pyav'"):
        open_video(zoo.path(name), decoder="decord")
    open_video(zoo.path(name)).read([0])
    assert not batches


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mpeg4_b.avi", "it is mpeg4 in avi, not H.264 or HEVC in MP4, MOV or MKV"),
        ("hevc.mp4", "its key frames are not those of the file, which has open groups"),
        ("h264_refresh.mp4", "decoding cannot start at each of its key frames"),
        ("cut-hevc.mp4", "it counts 24 frames where 20 are shown"),
    ],
)
def test_the_reason_for_which_decord_is_refused_is_named(zoo: Zoo, name: str, reason: str) -> None:
    pytest.importorskip("decord")
    with pytest.raises(UnreadableVideoError, match=reason):
        open_video(zoo.path(name), decoder="decord")


@pytest.mark.parametrize("size", ["16:16", "48:32", "36:20", "130:18"])
def test_rows_that_decord_pads_are_cut(tmp_path: Path, size: str) -> None:
    pytest.importorskip("decord")
    path = tmp_path / "narrow.mp4"
    encode(path, *CODECS["h264"].split(), "-vf", f"scale={size}")
    expected = open_video(path).read([30, 2, 2])
    assert np.array_equal(open_video(path, decoder="decord").read([30, 2, 2]), expected)


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "mpeg4_b.avi", "default.gif", "theora.ogv"])
def test_every_frame_alone_shows_its_number(zoo: Zoo, name: str) -> None:
    reader = open_video(zoo.path(name))
    assert [numbers(reader.read([i]))[0] for i in range(COUNT)] == list(range(COUNT))


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "avi", "flv"])
@pytest.mark.parametrize("rate", ["24", "30000/1001", "60"])
def test_frames_per_second_are_those_of_the_file(tmp_path: Path, container: str, rate: str) -> None:
    encode(tmp_path / f"video.{container}", *CODECS["h264_no_b"].split(), rate=rate)
    reader = open_video(tmp_path / f"video.{container}")
    count, _, seconds = rate.partition("/")
    assert reader.fps == pytest.approx(int(count) / int(seconds or 1), rel=1e-3)
    assert reader.times is None


@pytest.fixture
def slowing(tmp_path: Path) -> VideoReader:
    """25 frames a second up to frame 20, then 25 / 4."""
    path = tmp_path / "slowing.mp4"
    slow = ("-vf", "setpts='if(lt(N,20),N,20+4*(N-20))/25/TB'", "-fps_mode", "vfr")
    encode(path, *slow, *CODECS["h264"].split())
    return open_video(path)


def test_a_varying_rate_is_told_by_its_times(slowing: VideoReader) -> None:
    seconds = [i if i < 20 else 20 + 4 * (i - 20) for i in range(COUNT)]
    assert slowing.times == pytest.approx(np.array(seconds) / 25, abs=1e-3)
    assert slowing.fps == pytest.approx(39 / seconds[-1] * 25, rel=1e-3)


def test_a_clip_of_a_varying_rate_is_even_in_time(slowing: VideoReader) -> None:
    chosen = choose_clip(slowing, length=16, fps=6.25)  # four times 1 / 25 of a second
    assert chosen == [0, 4, 8, 12, 16, *range(20, 31)]
    assert numbers(slowing.read(chosen)) == chosen


def test_a_clip_of_a_part_goes_by_the_times_of_that_part(slowing: VideoReader) -> None:
    """The mean rate of the file, 9.9 a second, is not that of its fast beginning."""
    assert choose_clip(slowing, length=4, fps=5, last=19) == [0, 5, 10, 15]
    assert choose_clip(slowing, length=4, fps=5, first=2, last=19, start=1.0) == [4, 9, 14, 19]


@pytest.mark.parametrize(("options", "turn"), [(("90",), 1), (("180",), 2), (("270",), 3)])
def test_videos_of_phones_are_upright(zoo: Zoo, tmp_path: Path, options: tuple[str], turn: int) -> None:
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation:v:0", *options, "-i", str(zoo.path("h264.mp4")), "-c", "copy", str(turned))
    plain = open_video(zoo.path("h264.mp4")).read([3, 30])
    assert np.array_equal(open_video(turned).read([3, 30]), np.rot90(plain, turn, axes=(1, 2)))


def test_a_mirrored_video_is_mirrored(zoo: Zoo, tmp_path: Path) -> None:
    mirrored = tmp_path / "mirrored.mp4"
    ffmpeg("-display_hflip:v:0", "-i", str(zoo.path("h264.mp4")), "-c", "copy", str(mirrored))
    plain = open_video(zoo.path("h264.mp4")).read([7])
    assert np.array_equal(open_video(mirrored).read([7]), plain[:, :, ::-1])
    pytest.importorskip("decord")
    with pytest.raises(UnreadableVideoError, match="it is stored turned or mirrored"):
        open_video(mirrored, decoder="decord")


@pytest.mark.parametrize(
    ("name", "film"),
    [
        ("h264_open.mp4", "film.mp4"),
        ("h264.mp4", "film.ts"),
        ("h264.mp4", "film.flv"),
        ("hevc.mkv", "film.mkv"),
        ("vp9.webm", "film.webm"),
        ("mjpeg.avi", "film.avi"),
    ],
)
def test_long_films_open_without_being_decoded(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, film: str
) -> None:
    path = tmp_path / film
    ffmpeg("-stream_loop", "249", "-i", str(zoo.path(name)), "-c", "copy", str(path))
    decoded: list[int] = []

    def counting(video: OpenVideo, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, frame in decode(video, *arguments, **options):
            decoded.append(number)
            yield number, frame

    decode = OpenVideo.decode
    monkeypatch.setattr(OpenVideo, "decode", counting)
    reader = open_video(path)
    assert reader.num_frames == 250 * COUNT
    assert len(decoded) == 1  # it says that the file can be
    middle = numbers(reader.read(range(4990, 5006)))
    assert middle == [i % COUNT for i in range(4990, 5006)]


def test_a_file_is_indexed_again_when_it_changed(zoo: Zoo, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(zoo.path("h264.mp4").read_bytes())
    assert open_video(path).num_frames == COUNT
    path.write_bytes(zoo.path("cut-h264_open.mp4").read_bytes())
    assert open_video(path).num_frames == len(decode_whole(path)) < COUNT


def test_a_file_is_indexed_once(zoo: Zoo) -> None:
    path = zoo.path("mpeg4_b.avi")
    open_video(path)
    before = video_index._video_index.cache_info()
    open_video(path)
    after = video_index._video_index.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_threads_read_files_side_by_side(zoo: Zoo) -> None:
    names = ["h264.mp4", "hevc.mp4", "mpeg4_b.avi", "vp9.webm", "h264.mp4", "default.gif"]
    readers = [open_video(zoo.path(name)) for name in names]
    wrong: list[str] = []

    def read(name: str, reader: VideoReader) -> None:
        for first in range(0, 32, 3):
            if numbers(reader.read(range(first, first + 8, 2))) != list(range(first, first + 8, 2)):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(names, readers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4_b.avi", "mpeg2_b.mpg"])
def test_damage_gives_the_frames_that_ffmpeg_gives_or_an_error(zoo: Zoo, tmp_path: Path, name: str) -> None:
    content = bytearray(zoo.path(name).read_bytes())
    place = len(content) // 3  # MP4 has its table in the second half
    content[place : place + 300] = bytes(300)
    path = tmp_path / f"damaged{Path(name).suffix}"
    path.write_bytes(content)
    whole, reader = decode_whole(path), open_video(path)
    assert reader.num_frames == len(whole)
    for first in range(0, len(whole) - 4, 2):
        try:
            frames = reader.read(range(first, first + 4))
        except UnreadableVideoError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert_same(frames, whole[first : first + 4])


@pytest.mark.parametrize("name", ["h264_no_b.mp4", "mpeg4.avi", "h263p.mov", "png.mov"])
def test_frames_that_a_decoder_would_conceal_are_errors(zoo: Zoo, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"damaged{Path(name).suffix}"
    path.write_bytes(zoo.path(name).read_bytes())
    index = video_index.video_index(str(path))
    place, size = map(int, index.packets[13])
    with path.open("r+b") as file:
        file.seek(place + size // 2)
        file.write(np.random.default_rng(0).bytes(12))
    whole, reader = open_video(zoo.path(name)).read(range(COUNT)), open_video(path)
    last = min(frame for frame in index.starts[:, 1].tolist() if frame > 13) - 1  # they refer to it
    for frame in (0, 9, 12, last + 1, 39):
        assert_same(reader.read([frame]), whole[[frame]])
    for frame in (13, last):
        with pytest.raises(UnreadableVideoError, match=r"damaged\.\w+ (is damaged|cannot be|is no video)"):
            reader.read([frame])


@pytest.fixture
def lossy(zoo: Zoo, tmp_path: Path) -> Path:
    """A video of which FFmpeg leaves frame 15 out: the head of its picture is no longer one."""
    path = tmp_path / "lossy.mp4"
    path.write_bytes(zoo.path("h264_no_b.mp4").read_bytes())
    place = int(video_index.video_index(str(path)).packets[15, 0])
    with path.open("r+b") as file:
        file.seek(place + 5)  # after the size of the unit and its kind
        file.write(b"\x80" + bytes(9))
    return path


def test_frames_of_a_damaged_video_keep_their_times(lossy: Path) -> None:
    whole, reader = decode_whole(lossy), open_video(lossy)
    assert (len(whole), reader.num_frames) == (COUNT - 1, COUNT)
    for first in (0, 4, 10, 20, 30, 36):
        clip = range(first, first + 4)
        # FFmpeg's list, in which those after the lost frame are one place further to the front.
        expected = whole[[i if i < 15 else i - 1 for i in clip]]
        assert_same(reader.read(clip), expected)
        assert numbers(expected) == list(clip)
    for clip in ([15], [12, 13, 14, 15], [0, 15, 30]):
        with pytest.raises(UnreadableVideoError, match=r"lossy\.mp4 is damaged: the frames up to 15 are not"):
            reader.read(clip)


def test_decord_is_refused_for_a_damaged_video(lossy: Path) -> None:
    pytest.importorskip("decord")
    with pytest.raises(UnreadableVideoError, match="some of its frames cannot be decoded: it is damaged"):
        open_video(lossy, decoder="decord")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("indices", [[-1], [0, COUNT], []])
def test_frames_that_are_not_there_are_refused(zoo: Zoo, indices: list[int], decoder: Decoder) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    with pytest.raises(UnreadableVideoError, match=r"h264\.mp4 has the frames 0 to 39, asked were"):
        open_video(zoo.path("h264.mp4"), decoder=decoder).read(indices)


# What FFmpeg cannot write into a container by that name alone.
FORMATS = {".m2v": "mpeg2_b", ".vob": "mpeg2_b", ".mxf": "mpeg2_b", ".mpg": "mpeg1_b", ".mpeg": "mpeg1_b"}
FORMATS |= {".gif": "default", ".apng": "default", ".webm": "vp8", ".ogv": "theora", ".wmv": "wmv2"}


@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS)
def test_names_that_are_taken_for_videos_are_videos(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"video{extension}"
    encode(path, *CODECS[FORMATS.get(extension, "h264_no_b")].split())
    assert numbers(open_video(path).read([0, 9, 30])) == [0, 9, 30]
