"""``lightning serve``: embeddings over HTTP in OpenAI's form."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    from parallel_decoupling.serving.requests import Limits

    parser.add_argument("model", type=str, help="checkpoint or exported folder")
    parser.add_argument(
        "--host",
        type=Literal["127.0.0.1", "0.0.0.0", "::"],
        default="127.0.0.1",
        help="addresses to listen on",
    )
    parser.add_argument("--port", type=int, default=8000, help="1024 to 65535")
    parser.add_argument(
        "--path", type=int | Literal["aggregate"], default=0, help="what the model name 'default' stands for"
    )
    parser.add_class_arguments(Limits, "limits")


def run(options: Any) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        import litserve  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "litserve":
            raise
        raise ValueError("serving needs LitServe: pip install 'parallel-decoupling[serve]'") from error
    from parallel_decoupling.serving.lifetime import run_server

    run_server(partial(_build, options), options.host, options.port)


def _build(options: Any) -> Any:
    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.serving.requests import Limits
    from parallel_decoupling.serving.server import build_server

    return build_server(
        partial(Embedder.from_pretrained, options.model), options.path, Limits(**options.limits.as_dict())
    )
