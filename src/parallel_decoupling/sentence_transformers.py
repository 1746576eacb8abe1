"""An ``Embedder`` as a ``SentenceTransformer`` (its prompts, quantization), and for ``mteb``."""

from __future__ import annotations

import logging
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

import torch

from parallel_decoupling.batch import TokenLimit
from parallel_decoupling.data.prompts import to_raw_input
from parallel_decoupling.data.unusable import RowError, attempt, doubled, one_row
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import STAND_IN, embed, undisturbed
from parallel_decoupling.files import workplace
from parallel_decoupling.model.identity import encoder_identity
from parallel_decoupling.model.pretrained import BACKBONE_DIR, CONFIG_FILE, PROCESSOR_DIR
from parallel_decoupling.option_types import PositiveInt, check_values, checked

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality_types import Modality
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError("pip install 'parallel-decoupling[sentence-transformers]' (version 6)") from error
if TYPE_CHECKING:
    from mteb.models import SentenceTransformerEncoderWrapper

Output = int | str  # a path's number, or ``"aggregate"``
BadInputs = Literal["error", "stand_in"]
PROMPTS_FILE = "config_sentence_transformers.json"
"""What ``SentenceTransformer`` writes first, with its own prompts, which may not be the embedder's."""

log = logging.getLogger(__name__)


class PathEmbedding(InputModule):
    """The aggregate or one path of an embedder, as the only module of a ``SentenceTransformer``.

    ``SentenceTransformer.encode(..., paths=0)`` chooses another path, or ``"aggregate"``, for one call.
    Embeddings equal ``embedder.encode(inputs, instruction=prompt, paths=paths)``, but that every string is a
    text. An input that cannot be embedded is a ``RowError``, or with ``bad_inputs="stand_in"`` gets the
    embedding of another text, and ``num_stand_ins`` counts it.
    """

    forward_kwargs = {"paths"}
    modalities: list[Modality] = ["text", "image", ("image", "text"), "message"]
    """With ``message``, one batch may hold texts and images; chat messages themselves are refused."""

    def __init__(
        self, embedder: Embedder, paths: Output = "aggregate", bad_inputs: BadInputs = "error"
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bad_inputs, self.num_stand_ins, self.num_cut = bad_inputs, 0, 0
        self.embedder, self.encoder = embedder, embedder.encoder
        self.paths = self._checked(paths)
        self.collator, self.tokenizer = embedder.collator, embedder.encoder.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """``max_tokens`` of the embedder; one that is set here is this module's alone, and is saved."""
        return self.embedder.limit.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.embedder = copy(self.embedder)
        about = self.encoder.backbone, self.encoder.processor, value, self.embedder.limit.long_text
        self.embedder.limit = TokenLimit.of(*about)
        self.collator = self.embedder.collator

    @undisturbed(torch.device("cpu"))
    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Tokenise what ``Embedder.encode`` takes, with ``prompt`` and a space before every text."""
        if options.get("processing_kwargs"):
            raise ValueError("processing_kwargs have no effect on this model: set max_seq_length instead")
        given = [{"text": item} if isinstance(item, str) else item for item in inputs]
        instruction, numbers = (prompt or "").strip() or None, range(len(inputs))
        read, problems = attempt(lambda number: to_raw_input(given[number], instruction), numbers)
        rows = [read.get(number, STAND_IN) for number in numbers]
        encoded, unusable = self.collator.encode_usable(rows)
        problems |= unusable
        for number, problem in problems.items() if self.bad_inputs == "error" else ():
            with one_row(f"{reprlib.repr(inputs[number])}: "):
                raise problem
        if encoded is None or unusable:
            used = [STAND_IN if number in unusable else row for number, row in enumerate(rows)]
            encoded = self.collator.encode_inputs(used)
        self._count("num_stand_ins", len(problems), "inputs that got a stand-in")
        self._count("num_cut", encoded.num_cut, f"texts cut to {self.max_seq_length} tokens")
        return {"encoder_inputs": encoded}

    def _count(self, name: str, new: int, what: str) -> None:
        before = getattr(self, name)
        setattr(self, name, before + new)
        if doubled(before, new):
            log.warning("%s so far: %d", what, before + new)

    def forward(
        self, features: dict[str, Any], paths: Output | None = None, **options: Any
    ) -> dict[str, Any]:
        """Add ``sentence_embedding`` ``[B, D]``, fp32, unit norm, to ``features``."""
        chosen = self.paths if paths is None else self._checked(paths)
        inputs = features["encoder_inputs"].to(self.embedder.device)
        numbers = [chosen] if isinstance(chosen, int) else None
        trains = self.training and torch.is_grad_enabled()
        with ExitStack() as stack:
            if not trains:
                stack.enter_context(undisturbed(self.embedder.device))
                stack.enter_context(self.encoder.turns.encoding(self.encoder))
            embedding_BND = embed(self.encoder, inputs, numbers)
            embedding_BD = embedding_BND[:, 0] if numbers else self.encoder.aggregate(embedding_BND)
        return {**features, "sentence_embedding": embedding_BD}

    def train(self, mode: bool = True) -> PathEmbedding:
        """Set the mode; that of the shared encoder for evaluation is left to every call, as it may train."""
        if mode:
            super().train()
        self.training = mode
        return self

    def get_embedding_dimension(self) -> int:
        """Return D of one path, or of the aggregate."""
        return self.encoder.embed_dim if isinstance(self.paths, int) else self.encoder.aggregate_dim

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the embedder's own files, of a chosen path that path alone; the library writes the others.

        A model that was saved here before stays whole, at last beside the folder, until the new one is there.
        """
        folder = Path(output_path).resolve()
        replaces = any((folder / name).exists() for name in (CONFIG_FILE, BACKBONE_DIR, PROCESSOR_DIR))
        if replaces and folder == Path.cwd():
            raise ValueError(f"{folder} is the working folder, whose model is not replaced; name another one")
        with workplace(folder.parent if replaces else folder, folder) as place:
            new = place / "m"
            self.embedder.save_pretrained(new, [self.paths] if isinstance(self.paths, int) else None)
            if (folder / PROMPTS_FILE).exists():
                shutil.copy(folder / PROMPTS_FILE, new)
            if not replaces:
                for file in new.iterdir():
                    file.replace(folder / file.name)
                return
            before = Path(mkdtemp(prefix=f"{folder.name}.before-", dir=folder.parent))
            folder.replace(before)
            new.replace(folder)
            for file in (each for each in before.iterdir() if not (folder / each.name).exists()):
                file.replace(folder / file.name)
            shutil.rmtree(before)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", **options: Any
    ) -> PathEmbedding:
        """Load an exported folder, local or from the hub; of one path it gives that path."""
        unused = {name: options.get(name) for name in ("model_kwargs", "processor_kwargs", "config_kwargs")}
        unused |= {"backend": options.get("backend", "torch").replace("torch", "")}
        if given := {name: value for name, value in unused.items() if value}:
            raise ValueError(f"{given} would have no effect here; use model.to(), half() or bfloat16()")
        names = ("token", "cache_folder", "revision", "local_files_only")
        of_hub = {name: options[name] for name in names if name in options}
        folder = cls.load_dir_path(model_name_or_path, subfolder, **of_hub)
        if folder is None:
            raise ValueError(f"no folder {model_name_or_path!r}")
        embedder = Embedder.from_pretrained(folder)
        return cls(embedder, 0 if embedder.num_paths == 1 else "aggregate")

    def _checked(self, paths: Output) -> Output:
        if paths == "aggregate" or paths in range(self.encoder.num_paths):
            return paths
        last = self.encoder.num_paths - 1
        raise ValueError(f"paths is {paths!r}; use 'aggregate' or a path number, 0 to {last}")


def encode_options(
    prompt: str | None,
    batch_size: PositiveInt,
    truncate_dim: PositiveInt | None,
    output_value: Literal["sentence_embedding"] | None,
) -> None:
    """Declare the options of ``encode`` that the library takes unchecked."""


class PathSentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` whose errors name the place of an input in the list that was given."""

    first: int | None = None
    """Place of the next call's first input, where one list comes in several calls."""

    @undisturbed(torch.device("cpu"))
    def encode(self, *args: Any, **options: Any) -> Any:
        """Encode as the library does."""
        names = ("inputs", "prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value")
        given = dict(zip(names, args, strict=False)) | options
        defaults = {"prompt": None, "batch_size": 1, "truncate_dim": None}
        check_values(encode_options, defaults | {"output_value": "sentence_embedding"} | given)
        inputs: Any = given.get("inputs", given.get("sentences"))
        items = [inputs] if self.is_singular_input(inputs) else list(inputs)
        try:
            result = super().encode(*args, **options)
        except RowError:  # batches are sorted by length, and may be made in other processes
            name = given.get("prompt_name") or self.default_prompt_name
            prompt = self.prompts.get(name or "") if given.get("prompt") is None else given["prompt"]
            for index, item in enumerate(items):
                with one_row(f"input {(self.first or 0) + index}: "):
                    self.preprocess([item], prompt)
            raise
        self.first = None if self.first is None else self.first + len(items)
        return result


@checked()
def as_sentence_transformer(
    model: Embedder | str | Path,
    paths: Output = "aggregate",
    *,
    prompts: Mapping[str, str] | None = None,
    truncate_dim: PositiveInt | None = None,
    device: str | torch.device = "cpu",
    bad_inputs: BadInputs = "error",
) -> PathSentenceTransformer:
    """Make a ``SentenceTransformer`` of an embedder, a checkpoint, a run or an exported folder.

    Args:
        model: an embedder, which is shared and not copied, or what ``Embedder.from_pretrained`` takes.
        paths: what ``encode`` gives: a path's number, or ``aggregate``.
        prompts: by name; None is ``query`` and ``document``, the embedder's own instructions.
        truncate_dim: numbers to keep of every embedding.
        device: where it runs.
        bad_inputs: what an input that cannot be embedded is: an error with its place in the list, or the
            embedding of a stand_in, counted by ``model[0].num_stand_ins`` and in the log.
    """
    embedder = model if isinstance(model, Embedder) else Embedder.from_pretrained(model)
    own = {"query": embedder.query_instruction, "document": embedder.candidate_instruction}
    return PathSentenceTransformer(
        modules=[PathEmbedding(embedder, paths, bad_inputs)],
        prompts=dict(own if prompts is None else prompts),
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
        device=str(device),
        local_files_only=True,
    )


@checked()
def mteb_model(
    model: Embedder | str | Path,
    paths: Output = "aggregate",
    *,
    prompts: Mapping[str, str] | None = None,
    bad_inputs: BadInputs = "error",
    name: str | None = None,
) -> SentenceTransformerEncoderWrapper:
    """Make a model that ``mteb.evaluate`` takes; of a plain ``SentenceTransformer`` it assumes texts only.

    ``prompts`` are by ``query``, ``document`` or the name of a task or of its type; None is the model's own.
    ``bad_inputs`` is as for ``as_sentence_transformer``. Under ``name``, "owner/model", it is registered for
    ``mteb.get_model``; its revision is the hash of the weights and all else that shapes embeddings.
    """
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.model_implementations import MODEL_REGISTRY

    class Wrapper(SentenceTransformerEncoderWrapper):
        """Counts inputs over the calls by which mteb encodes one side of a task."""

        def encode(self, *args: Any, **options: Any) -> Any:
            self.model.first = 0
            return super().encode(*args, **options)

    try:
        Wrapper.validate_task_to_prompt_name(dict(prompts or {}))
    except KeyError as error:
        raise ValueError(f"mteb would ignore some prompts: {error.args[0]}") from error
    options: dict[str, Any] = {"prompts": prompts, "bad_inputs": bad_inputs}
    wrapped = Wrapper(as_sentence_transformer(model, paths, **options))
    embedding: Any = wrapped.model[0]
    embedder = embedding.embedder
    about = {"paths": paths, "prompts": wrapped.model.prompts, "images": embedder.images.settings}
    about |= {"bad_inputs": bad_inputs, **vars(embedder.limit)}
    known: dict[str, Any] = {"name": name or f"parallel-decoupling/{paths}", "modalities": ["image", "text"]}
    known["revision"] = encoder_identity(embedder.encoder, **about)["sha256"]  # mteb keeps scores by it
    known["loader"] = lambda *about, device=None, **rest: wrapped
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=known)
    if name is not None:
        MODEL_REGISTRY[name] = wrapped.mteb_model_meta
    return wrapped
