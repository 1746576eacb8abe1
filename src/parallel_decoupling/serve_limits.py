"""What guards the server: limits, the form and time of a request, and refusals in OpenAI's form."""

import asyncio
import json
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from parallel_decoupling.data.images import DATA_URI, as_picture, load_image
from parallel_decoupling.data.unusable import one_row
from parallel_decoupling.option_types import PositiveFloat, PositiveInt, check_values

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_ROUTES = "POST /v1/embeddings, GET /v1/models, GET /health and GET /metrics"


@dataclass(frozen=True)
class Limits:
    """What requests may cost.

    Args:
        body_bytes: most bytes in a request.
        inputs: most inputs in a request.
        characters: most characters in an input's text and instruction together.
        pixels: most pixels in an image.
        waiting: most requests that have arrived and are not answered yet; further ones get status 429.
        batch_size: inputs per forward pass, of as many requests.
        tokens: most tokens of a forward pass, unless a single input has more; a request with more takes turns
            with the others, which wait for one such pass at most.
        seconds: a request that is not answered by then gets status 503.
        read_seconds: how long the head of a request may take to arrive, and then its body (status 408).
    """

    body_bytes: PositiveInt = 20_000_000
    inputs: PositiveInt = 2048
    characters: PositiveInt = 32_000
    pixels: PositiveInt = 16_000_000
    waiting: PositiveInt = 256
    batch_size: PositiveInt = 32
    tokens: PositiveInt = 16_384
    seconds: PositiveFloat = 120.0
    read_seconds: PositiveFloat = 20.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(Limits, vars(self), "limits.")


class Known(BaseModel, extra="forbid", strict=True):
    """An object without unknown keys; of too many not every one is an error of its own."""

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 20:
            raise ValueError(f"{len(value)} keys; known are {', '.join(cls.model_fields)}")
        return value


def _picture(uri: str, info: ValidationInfo[Limits]) -> Any:
    """Check a picture; what is returned is not decoded, as a request may have many."""
    with one_row("must be a picture in base64, as data:image/png;base64,...: "):
        if not DATA_URI.match(uri):  # nor is it a file of this machine
            raise ValueError("this is not a data URI in base64")
        image: Any = as_picture(unquote(uri))
    if math.prod(image.size) > (most := info.context.pixels):
        raise PydanticCustomError("too_large", "image has more than {pixels} pixels", {"pixels": most})
    load_image(image)  # a check; encode does it again, with the model's settings
    return as_picture(unquote(uri))


Picture = Annotated[str, AfterValidator(_picture)]


class Input(Known):
    """A text (or the model's own tokens of one), an image, or both."""

    text: str = ""
    image: Picture | None = None
    instruction: str | None = None
    tokens: Annotated[list[int], FailFast()] = []


class TextPart(Known):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class ImageUrl(Known):
    """A picture; of every ``detail`` the model's own settings of pictures decide."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Known):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Known):
    """A message of a chat; a text as ``content`` stands for one part."""

    role: Literal["system", "user"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Body(Known):
    """The body of a request, as OpenAI's clients send it; a chat is its ``input``."""

    messages: Annotated[list[Message], FailFast()] = []
    input: Annotated[list[Input], FailFast(), Field(default=None, validate_default=True)]
    model: str = "default"
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any, info: ValidationInfo[Limits]) -> Any:
        # strings are texts, never names of files
        if (value is None) != bool(info.data.get("messages")):
            raise ValueError("give either input or messages, and not an empty list of these")
        value = chat_input(info.data["messages"]) if value is None else value
        single = not isinstance(value, list) or {*map(type, value)} == {int}
        items, most = [value] if single else value, info.context.inputs
        if not 0 < len(items) <= most:
            raise RequestError(f"input must have 1 to {most} items", 413 if items else 400)
        kinds: dict[type, str] = {str: "text", list: "tokens"}
        return [{kinds[type(item)]: item} if type(item) in kinds else item for item in items]


def chat_input(messages: Sequence[Message]) -> dict[str, Any]:
    """Return a chat as one input: the system gives the instruction, a user texts and at most one image."""
    parts = [(message.role, part) for message in messages for part in message.content]
    texts = [(role, part.text) for role, part in parts if isinstance(part, TextPart)]
    images = [(role, part.image_url.url) for role, part in parts if isinstance(part, ImagePart)]
    if len(images) > 1 or any(role != "user" for role, _ in images):
        raise RequestError("messages may have one image, which is the user's", param="messages")
    said = {wanted: " ".join(text for role, text in texts if role == wanted) for wanted in ("user", "system")}
    return {"text": said["user"], "instruction": said["system"], "image": images[0][1] if images else None}


class RequestError(HTTPException):
    """A request that is refused, with its status and the key of the body that is to blame."""

    def __init__(self, message: str, status: int = 400, param: str | None = "input") -> None:
        super().__init__(status, message, {"retry-after": "1"} if status in (429, 503) else None)
        self.param = param


async def within(seconds: float, work: Awaitable[bytes], status: int, late: str) -> bytes:
    """Wait for work, or raise a ``RequestError``."""
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:
        message = f"{late} within {seconds:g} s; send fewer or shorter inputs"
        raise RequestError(message, status, None) from error


def refusal(error: Exception, call: str = "") -> tuple[int, dict[str, Any]]:
    """Return the status and OpenAI's form of an error, of a ``call`` such as GET /x."""
    status = getattr(error, "status_code", 400 if isinstance(error, ValueError | ClientDisconnect) else 500)
    param = getattr(error, "param", "input" if isinstance(error, ValueError) else None)
    message = getattr(error, "detail", str(error))
    if isinstance(error, HTTPException) and not isinstance(error, RequestError):
        message = f"{message}: {call}; the server answers {_ROUTES}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
        message = f"{''.join(place).lstrip('.') or 'body'}: {first['msg'].removeprefix('Value error, ')}"
        param, status = place[0][1:] if place else None, 413 if first["type"] == "too_large" else 400
    message = "the server failed; its log says why" if status == 500 else message[:1000]
    code = "model_not_found" if (status, param) == (404, "model") else None
    kind = _KINDS.get(status, "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TimedProtocol(H11Protocol):
    """HTTP in which the head of a request has ``timeout_keep_alive`` seconds to arrive."""

    _head_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, if it is not there."""
        super().data_received(data)
        self._time_head()

    def _time_head(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        self._head_since = (self._head_since or self.loop.time()) if waits else None
        if self._head_since:  # more data ends this timer
            end, message = self._head_since + self.timeout_keep_alive, "The head did not arrive in time."
            self.timeout_keep_alive_task = self.loop.call_at(end, self.send_400_response, message)

    def send_400_response(self, msg: str) -> None:
        """Refuse what did not arrive in time, or cannot be parsed as HTTP."""
        content = json.dumps(refusal(RequestError(msg, param=None))[1])
        head = f"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
        self.transport.write(f"{head}content-type: application/json\r\n\r\n{content}".encode())
        self.transport.close()
