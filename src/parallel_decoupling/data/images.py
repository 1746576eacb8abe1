"""Pictures: what is one by its type, finding files, decoding to 8-bit RGB, and giving the wanted size."""

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from parallel_decoupling.data.unusable import RowError, one_row
from parallel_decoupling.option_types import PositiveInt, check_memory, check_values

SquareSize = Literal["low", "mid", "high"]
SQUARES: dict[str, int] = {"low": 128, "mid": 672, "high": 1344}  # side in pixels of VLM2Vec's forced squares
IMAGE_SETTINGS = ("image_size", "min_pixels", "max_pixels", "max_frames", "max_video_pixels")
"""Names of the settings behind an ``ImagePolicy``."""
FRAMES = (".jpg", ".jpeg", ".png")  # how the files of a video's frames end
DATA_URI = re.compile(r"\s*data:(image/[^,\s]*|[^,\s]*;\s*base64),", re.IGNORECASE)
"""Begins a text that is a picture, whatever media type it names."""
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://\S+\s*", re.IGNORECASE)
_CHANNELS = (1, 3, 4)
_DECODING = Lock()  # Pillow reads a picture that was opened and not loaded from one position of its file
OVERSHOOT = 1e-3
"""By so much may a picture's numbers leave their range, as after resizing; they are clipped."""


@dataclass(frozen=True)
class ImagePolicy:
    """What happens to a picture before the processor sees it (and perhaps resizes it once more).

    Attributes:
        image_size: forces a square and ignores the EXIF orientation, as VLM2Vec does in its published rows.
        min_pixels: width times height at least; needs no ``image_size``.
        max_pixels: width times height at most. With either bound, the sides become multiples of ``factor``
            near the aspect ratio, and a picture with a side below it a square of twice that, as in VLM2Vec.
        factor: the processor's patch times merge size; 1 where it has none.
        max_frames: of a video at most, evenly chosen as in VLM2Vec.
        max_video_pixels: width times height times number of frames at most; None leaves it to the processor.
    """

    image_size: SquareSize | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    factor: PositiveInt = 1
    max_frames: PositiveInt = 8
    max_video_pixels: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_values(ImagePolicy, vars(self))
        low, high = self.min_pixels or 1, self.max_pixels or math.inf
        if self.image_size is not None and (self.min_pixels or self.max_pixels):
            meaning = "forces a square, so min_pixels and max_pixels have no meaning"
            raise ValueError(f"image_size={self.image_size!r} {meaning}. Set one or the other to null.")
        if low > high:
            raise ValueError(f"min_pixels={low} is above max_pixels={high}. Exchange them.")
        check_memory(f"min_pixels={self.min_pixels}", 15.0 * (self.min_pixels or 0))  # 8-bit, and as fp32

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ImagePolicy":
        """Return the policy of a data module's settings; one that is absent counts as not set."""
        return cls(**{name: settings[name] for name in IMAGE_SETTINGS if settings.get(name) is not None})

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that ``from_settings`` takes."""
        return {name: getattr(self, name) for name in IMAGE_SETTINGS}

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize with Pillow's bicubic filter, or return the image itself."""
        size = image.size
        if self.image_size is not None:
            size = (SQUARES[self.image_size],) * 2
        elif self.min_pixels is not None or self.max_pixels is not None:
            if min(size) < self.factor:
                size = (2 * self.factor,) * 2
            low, high = self.min_pixels or 1, self.max_pixels or math.inf
            size = smart_size(*size, factor=self.factor, min_pixels=low, max_pixels=high)
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def chosen(self, frames: Sequence[Image.Image | str]) -> list[Image.Image | str]:
        """Return the frames of a video that count, two at least, as vision towers take them in pairs."""
        numbers = np.linspace(0, len(frames) - 1, min(self.max_frames, len(frames)), dtype=int).tolist()
        return [frames[number] for number in (numbers if len(numbers) > 1 else numbers * 2)]

    def video(self, frames: Sequence[Image.Image | str]) -> list[Image.Image]:
        """Decode the ``chosen`` frames, all in the size of the first within the budget."""
        loaded = [load_image(frame, turn=self.image_size is None) for frame in self.chosen(frames)]
        size, kind = self.frame_size(loaded[0].size, len(loaded)), Image.Resampling.BICUBIC
        return [frame if frame.size == size else frame.resize(size, kind) for frame in loaded]

    def frame_size(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        """Return width and height of the frames that the processor gets of so many of this size."""
        if self.image_size is not None:
            return (SQUARES[self.image_size],) * 2
        if self.max_video_pixels is None:
            return size
        most = self.max_video_pixels / count
        return smart_size(*size, factor=self.factor, min_pixels=1, max_pixels=most)


def smart_size(
    width: int, height: int, *, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Return width and height within a pixel budget as transformers' ``smart_resize`` does, for any ratio."""
    new_width = max(factor, round(width / factor) * factor)
    new_height = max(factor, round(height / factor) * factor)
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)  # divided by, for the same rounding as there
        new_width = max(factor, math.floor(width / scale / factor) * factor)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
    elif new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * scale / factor) * factor
        new_height = math.ceil(height * scale / factor) * factor
    return new_width, new_height


def is_array(value: Any) -> bool:
    """Tell whether a value is an array or a tensor of numbers, of which several make a batch."""
    if isinstance(value, Tensor):
        return not value.is_complex()
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def formats() -> list[str]:
    """Return the formats that are read: those of Pillow without EPS, for which it starts Ghostscript."""
    Image.preinit()  # its order is that of trying
    Image.init()
    return [kind for kind in Image.ID if kind != "EPS"]


def names_picture(text: str) -> bool:
    """Tell whether an untyped string is a picture: a data URI, or an existing file that Pillow opens."""
    _refuse_address(text)
    if DATA_URI.match(text):
        return True
    if not os.path.isfile(text):
        return False
    try:
        with one_row(f"{text}: "), Image.open(text, formats=formats()):
            return True
    except RowError as error:
        return isinstance(error.__cause__, Image.DecompressionBombError)


def as_picture(value: Any) -> Image.Image | str:
    """Return what is a picture by its type as a PIL image or a file's name, or raise ``ValueError``."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and {"bytes", "path"} == set(value):  # a row of datasets, not decoded
        return as_picture(value["path"] if value["bytes"] is None else value["bytes"])
    if isinstance(value, bytes | bytearray | memoryview):
        return _opened(bytes(value))
    if isinstance(value, str) and DATA_URI.match(value):
        return _opened(_uri_bytes(value))
    if isinstance(value, str | os.PathLike):
        file = os.fspath(value)
        _refuse_address(file)
        if not os.path.isfile(file):
            raise ValueError(f"no image file {file!r}")
        return file
    if is_array(value):
        return _from_array(value)
    known = "a file, a data URI, a PIL image, an array, a tensor or the bytes of a file"
    raise ValueError(f"a {type(value).__name__} cannot be embedded; use a text, or as a picture {known}")


def as_video(value: Any) -> tuple[Image.Image | str, ...]:
    """Return the frames of a video: a list of what ``as_picture`` takes, or the name of their folder."""
    if isinstance(value, str | os.PathLike) and os.path.isdir(value):
        return frame_files(os.fspath(value))
    if not isinstance(value, list | tuple) or not value:
        known = "use a list of its frames, which are pictures, or the name of a folder of them"
        raise ValueError(f"a {type(value).__name__} is not a video: {known}")
    return tuple(map(as_picture, value))


def frame_files(folder: str) -> tuple[str, ...]:
    """Return the frames in a folder, in the order of the numbers in their names."""
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in FRAMES]
    if not names:
        advice = f"A video is a folder of files that end with {', '.join(FRAMES)}; unpack them there."
        raise ValueError(f"no frames in the folder {folder!r}. {advice}")
    parts = {name: re.split(r"(\d+)", name.lower()) for name in names}
    order = sorted(names, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in parts[name]])
    return tuple(os.path.join(folder, name) for name in order)


def _refuse_address(text: str) -> None:
    if _ADDRESS.fullmatch(text):
        advice = "download it and pass the file, or pass {'text': ...} if the address itself is the text"
        raise ValueError(f"{text.strip()!r} is an address, and nothing is fetched: {advice}")


def _uri_bytes(uri: str) -> bytes:
    """Decode a data URI, with or without line breaks and padding, in either alphabet of base64."""
    head, _, data = uri.partition(",")
    if not re.sub(r"\s", "", head).lower().endswith(";base64"):
        raise ValueError("a data URI must be in base64: data:image/png;base64,...")
    data = re.sub(r"\s|=+\s*$", "", data).replace("-", "+").replace("_", "/")
    return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes that are not a picture in a format that Pillow reads") from error


def _from_array(value: Any) -> Image.Image:
    if np.ma.is_masked(value):
        raise ValueError("a picture with masked pixels; replace them by filled(value)")
    first = isinstance(value, Tensor)  # where the channels are if both ends could be
    if first:
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in _CHANNELS and (first or array.shape[2] not in _CHANNELS):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or (array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in _CHANNELS)):
        known = "use [height, width], [height, width, 3] or [3, height, width]"
        raise ValueError(f"an array of shape {list(array.shape)} is not a picture; {known}")
    return Image.fromarray(_eight_bits(array))


def load_image(image: Image.Image | str, *, turn: bool = True) -> Image.Image:
    """Decode an image or file to 8-bit RGB or raise ``RowError``; ``turn`` applies the EXIF orientation."""
    name = image if isinstance(image, str) else f"of {image.width} x {image.height} pixels"
    with one_row(f"Cannot read image {name}; replace the file or remove its row: "):
        if not isinstance(image, str):
            if getattr(image, "tile", None) and getattr(image, "fp", image) is None:
                raise ValueError(
                    "its file was closed unread; embed it inside `with`, or call its load() there"
                )
            with _DECODING:
                image.load()
            return _rgb(ImageOps.exif_transpose(image) if turn else image)
        with _open_file(image) as file:
            if turn:
                ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file)


def _open_file(file: str) -> Image.Image:
    if not os.path.isfile(file):  # opening a named pipe would wait for ever
        raise ValueError("it is not a regular file" if os.path.exists(file) else "the file does not exist")
    return Image.open(file, formats=formats())


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(values: Any) -> Any:
    """Scale numbers to 8 bits: from 0 to 1 (fractions), to 255 or to 65535, whichever holds the largest.

    Each range is wider by ``OVERSHOOT``.
    """
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    tops = (255, 65535) if values.dtype.kind in "iu" else (1, 255, 65535)
    top = next((top for top in tops if high <= top + OVERSHOOT), None)
    if top is None or not low >= -OVERSHOOT:
        known = "known are 0 to 1, to 255 and to 65535. Convert it to 8 bits"
        raise ValueError(f"a picture with values from {low:g} to {high:g}; {known}")
    return np.rint(values.astype(np.float64).clip(0, top) * (255 / top)).astype(np.uint8)


def image_size(image: Image.Image | str) -> tuple[int, int] | None:
    """Return width and height, of a file from its header, or None if it cannot be read."""
    if isinstance(image, Image.Image):
        return image.size
    try:
        with one_row(f"{image}: "), _open_file(image) as found:
            return found.size
    except RowError:
        return None


class ImageFolder:
    """Finds the files that the image cells of a table name.

    Each root is tried with the cell as it is and with ``images/`` added or taken away: MMEB may be unpacked
    with or without it. Without ``must_exist``, ``get`` returns the cell unchanged if the file is missing.
    """

    def __init__(self, *roots: Path, must_exist: bool = True) -> None:
        self.roots, self.must_exist = roots, must_exist

    def find(self, image: str) -> str | None:
        """Return the file or the folder of frames, or None if there is neither; dots alone name neither."""
        names = (image, f"images/{image}", image.removeprefix("images/"))
        files = (os.path.join(root, name) for root in self.roots for name in names)
        return next(filter(os.path.exists, files), None) if image.strip("./") else None

    def get(self, image: str) -> str:
        """Return the file, or raise ``ValueError`` if there is none and there must be."""
        file = self.find(image)
        if file is None and self.must_exist:
            roots = " or ".join(map(str, self.roots))
            advice = "Unpack the dataset's images there, with or without a folder images/."
            raise ValueError(f"no image file {image!r} under {roots}. {advice}")
        return file or image
