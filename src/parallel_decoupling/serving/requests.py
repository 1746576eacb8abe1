"""From the body of ``POST /v1/embeddings`` to inputs, or to one error in OpenAI's form.

Here: what a request may say, and its limits. Elsewhere on purpose: the size of the body and the queue
(``gate``), images behind addresses (``fetch``), embedding (``batches``).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from parallel_decoupling.data.images import load_image

Selection = Literal["aggregate"] | int
DEFAULT_MODEL = "default"
_KEYS = ("input", "model", "dimensions", "encoding_format", "user")
_ITEM_KEYS = ("text", "image", "instruction")


class RequestError(ValueError):
    """A request that cannot be answered.

    Args:
        message: what is wrong and where.
        status: of the HTTP response.
        param: key of the body.
        code: short name of the error.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_body(self) -> dict[str, Any]:
        """The response's body in OpenAI's form."""
        return error_body(str(self), self.status, self.param, self.code)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What one request and all waiting ones together may cost.

    Attributes:
        body_bytes: of a request.
        inputs: of a request.
        characters: of an input's text and instruction together.
        pixels: of an image, width times height, read from its header before decoding.
        waiting: requests that are being answered or wait; further ones get status 429.
        batch_requests: requests that are embedded together.
        batch_rows: inputs per forward pass.
        allowed_hosts: from which images are fetched, each as it stands in the address (``example.org``,
            ``10.0.0.7:8080``).
    """

    body_bytes: int = 20_000_000
    inputs: int = 256
    characters: int = 32_000
    pixels: int = 16_000_000
    waiting: int = 256
    batch_requests: int = 32
    batch_rows: int = 32
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in vars(self).items():
            if name != "allowed_hosts" and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Catalog:
    """The names under which a model's embeddings are served.

    Attributes:
        num_paths: N.
        path_dim: D, numbers per path.
        aggregate_dim: numbers of the aggregate.
        default: what the name ``default`` stands for.
    """

    num_paths: int
    path_dim: int
    aggregate_dim: int
    default: Selection

    def __post_init__(self) -> None:
        """Check the default."""
        if isinstance(self.default, int) and not 0 <= self.default < self.num_paths:
            raise ValueError(
                f"there is no path {self.default}; the model has paths 0 to {self.num_paths - 1}"
            )

    @property
    def names(self) -> dict[str, Selection]:
        """Every name and what it selects."""
        paths: dict[str, Selection] = {f"path_{path}": path for path in range(self.num_paths)}
        return {DEFAULT_MODEL: self.default, "aggregate": "aggregate", **paths}

    def dim(self, selection: Selection) -> int:
        """Numbers of an untruncated embedding."""
        return self.aggregate_dim if selection == "aggregate" else self.path_dim

    def to_body(self) -> dict[str, Any]:
        """The answer to ``GET /v1/models``."""
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "parallel-decoupling"}
            for name in self.names
        ]
        return {"object": "list", "data": rows}


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request.

    Attributes:
        inputs: as ``Embedder.encode`` takes them.
        model: the name asked for.
        selection: one path or the aggregate.
        truncate_dim: numbers to keep of every path, None keeps all.
        encoding_format: of the embeddings in the response.
    """

    inputs: list[dict[str, Any]]
    model: str
    selection: Selection
    truncate_dim: int | None
    encoding_format: Literal["float", "base64"]


def parse_json(body: bytes) -> Any:
    """Read a body as JSON.

    Raises:
        RequestError: it is not.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def parse_request(body: Any, catalog: Catalog, limits: Limits) -> EmbeddingRequest:
    """Check a request and decode its images.

    Args:
        body: the JSON.
        catalog: names that may be asked for.
        limits: that hold for it.

    Raises:
        RequestError: names the key, or the input by its number.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    unknown = sorted(set(body) - set(_KEYS))
    if unknown:
        raise RequestError(f"unknown keys {unknown}; use {list(_KEYS)}", param=unknown[0])
    model = body.get("model", DEFAULT_MODEL)
    if not isinstance(model, str) or model not in catalog.names:
        known = ", ".join(catalog.names)
        raise RequestError(f"there is no model {model!r}; use {known}", 404, "model", "model_not_found")
    selection = catalog.names[model]
    encoding_format = body.get("encoding_format", "float")
    if encoding_format not in ("float", "base64"):
        raise RequestError(
            f"encoding_format is {encoding_format!r}; use float or base64", param="encoding_format"
        )
    truncate_dim = _truncate_dim(body.get("dimensions"), catalog.dim(selection), catalog.path_dim)
    return EmbeddingRequest(_inputs(body, limits), model, selection, truncate_dim, encoding_format)


def _truncate_dim(dimensions: Any, whole: int, path_dim: int) -> int | None:
    """Numbers of every path that give an embedding of so many dimensions."""
    if dimensions is None:
        return None
    step = whole // path_dim  # paths that are concatenated
    good = isinstance(dimensions, int) and not isinstance(dimensions, bool)
    if not good or not step <= dimensions <= whole or dimensions % step:
        steps = "" if step == 1 else f", a multiple of {step}: the aggregate joins {step} paths"
        raise RequestError(f"dimensions is {dimensions!r}; use {step} to {whole}{steps}", param="dimensions")
    return int(dimensions) // step


def _inputs(body: Mapping[str, Any], limits: Limits) -> list[dict[str, Any]]:
    value = body.get("input")
    items = value if isinstance(value, list) else [value]
    if not items or value is None:
        raise RequestError("input is missing or empty", param="input")
    if len(items) > limits.inputs:
        raise RequestError(
            f"input has {len(items)} items; at most {limits.inputs} are allowed",
            413,
            "input",
            "too_many_inputs",
        )
    return [_item(item, f"input[{number}]", limits) for number, item in enumerate(items)]


def _item(item: Any, where: str, limits: Limits) -> dict[str, Any]:
    """One input as a dictionary: a plain string is never taken for a file's name."""
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise RequestError(
            f"{where} is a {type(item).__name__}; use a string or an object with text, image or both "
            "(token numbers are not supported)",
            param="input",
        )
    unknown = sorted(set(item) - set(_ITEM_KEYS))
    if unknown:
        raise RequestError(f"{where} has unknown keys {unknown}; use {list(_ITEM_KEYS)}", param="input")
    result = {key: value for key, value in item.items() if value is not None}
    if not all(isinstance(value, str) for value in result.values()):
        raise RequestError(f"{where}: text, image and instruction must be strings", param="input")
    characters = len(result.get("text", "")) + len(result.get("instruction", ""))
    if characters > limits.characters:
        raise RequestError(
            f"{where} has {characters} characters; at most {limits.characters} are allowed",
            413,
            "input",
            "text_too_long",
        )
    if "image" in result:
        result["image"] = _image(result["image"], where, limits)
    elif not result.get("text", "").strip():
        raise RequestError(f"{where} has neither text nor image", param="input")
    return result


def _image(uri: str, where: str, limits: Limits) -> Image.Image:
    head, comma, data = uri.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(
            f"{where}: image must be a data URI (data:image/png;base64,...); addresses are fetched only "
            "from allowed hosts",
            param="input",
        )
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        pixels = image.width * image.height
        if pixels <= limits.pixels:
            load_image(image)  # a check; encode does it again, with the model's settings
            return image
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.__cause__ or error
        raise RequestError(f"{where}: image cannot be decoded: {reason}", param="input") from error
    raise RequestError(
        f"{where}: image has {pixels} pixels; at most {limits.pixels} are allowed",
        413,
        "input",
        "image_too_large",
    )
