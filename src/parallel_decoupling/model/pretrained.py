"""Trained encoders: exported folders, models of the hub and checkpoints are read, folders to share written.

Nothing is unpickled, no code of a folder runs. Of a local folder nothing is downloaded: a backbone from the
hub must be in the local cache.
"""

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from pydantic import BaseModel
from safetensors.torch import load, save_file

from parallel_decoupling.batch import LongText
from parallel_decoupling.files import atomic_write, reading
from parallel_decoupling.model import encoder as encoders
from parallel_decoupling.model import identity, run_checkpoint
from parallel_decoupling.model.adapters import AdapterConfig, adapted_layers
from parallel_decoupling.model.backbone import Backbone, Dtype, load_processor
from parallel_decoupling.model.encoder import Encoder, ParallelEncoder
from parallel_decoupling.model.families import FAMILIES, Family
from parallel_decoupling.model.locations import HUB_ID, located, portable
from parallel_decoupling.model.model_card import model_card
from parallel_decoupling.model.open_clip import is_open_clip
from parallel_decoupling.model.path_lora import PathLoRA

MODEL_TYPE = "parallel_decoupling"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PROCESSOR_DIR, BACKBONE_DIR = "processor", "backbone"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")
ABOUT = ("query_instruction", "candidate_instruction", "images", "max_tokens", "long_text", "run")
"""What is kept of an encoder beside itself: instructions, limits of inputs, and what trained it."""


class Config(BaseModel, strict=True, extra="forbid"):
    """The types of what ``config.json`` of an exported folder holds."""

    model_type: Literal["parallel_decoupling"]
    settings: dict[str, Any]
    backbone_included: bool
    backbone: dict[str, Any]
    paths: list[int]
    embed_dim: int
    aggregate_dim: int
    files: dict[str, str]
    query_instruction: str
    candidate_instruction: str
    images: dict[str, Any]
    max_tokens: int | None
    long_text: LongText
    run: dict[str, Any]
    content_sha256: str


def is_pretrained(folder: str | Path) -> bool:
    """Tell whether a folder holds what ``save_encoder`` writes."""
    file = Path(folder) / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def load_encoder(
    path: str | Path, *, revision: str | None = None, dtype: Dtype | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """Load a trained encoder from an exported folder or hub model, a run or a checkpoint, without Lightning.

    It is on the CPU in evaluation mode; the dictionary has the plain values that ``ABOUT`` names. Changed
    weights or another backbone are a ValueError. ``dtype`` replaces that of the backbone's weights.
    """
    path = Path(path).expanduser() if str(path).startswith("~") else path
    of_hub = not os.path.exists(path) and HUB_ID.fullmatch(str(path)) is not None
    if revision is not None and not of_hub:
        raise ValueError(f"revision={revision!r}, but {str(path)!r} is not a model of the hub")
    path = _of_hub(str(path), revision) if of_hub else path
    with reading(path):
        exported = Path(path, CONFIG_FILE).is_file()
        encoder, about = _load_folder(Path(path), of_hub) if exported else _load_checkpoint(path)
    if dtype is not None:
        if not isinstance(encoder, ParallelEncoder) or about["settings"].get("quantization"):
            raise ValueError(f"dtype={dtype!r} does not work for an OpenCLIP model or a quantized backbone")
        base = encoder.backbone.base.named_parameters()
        for parameter in (each for name, each in base if "lora_" not in name):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    encoder.eval()
    return encoder, {name: about[name] for name in ABOUT}


def _of_hub(name: str, revision: str | None) -> Path:
    """Return the local copy of a model on the hub, without pickles and code."""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(f"no model at {name!r}, here or on the hub: {error}") from error
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"no model at {name!r} of the hub, which has no {CONFIG_FILE}")
    return folder


def save_encoder(
    encoder: Encoder,
    folder: str | Path,
    *,
    paths: Sequence[int] | None = None,
    merge_adapters: bool = False,
    include_backbone: bool = False,
    scores: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Write a folder to share; see ``Embedder.save_pretrained``. ``about`` are the values of ``ABOUT``.

    The encoder must not be sharded. A base model that was trained itself is always written, and so is one
    from a local folder that is not beside the new one.
    """
    folder = Path(folder).expanduser().resolve()
    if folder == Path.cwd():
        raise ValueError(f"{folder} is the working folder, which is not replaced; name another folder")
    if folder.exists() and any(folder.iterdir()):
        what = f"a model ({CONFIG_FILE})" if (folder / CONFIG_FILE).exists() else "files"
        raise ValueError(f"{folder} already holds {what}; name another folder or empty it")
    chosen = encoders.check_paths(paths, encoder.num_paths)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"paths must name each path once, got {chosen}")
    trained = isinstance(encoder, ParallelEncoder) and encoder.backbone.adapter.kind == "full"
    merge = merge_adapters or trained
    source = encoders.absolute_name(encoder.backbone.name)
    included = merge or include_backbone or portable(source, folder) is None
    settings = _settings(encoder, included=included, merge=merge) | {"num_paths": len(chosen)}
    if merge and len(chosen) > 1 and encoder.backbone.adapter.per_path:
        raise ValueError(f"every path has an adapter of its own: merge_adapters takes one path, not {chosen}")
    state = {
        name: (value[chosen] if identity.PER_PATH.search(name) else value).contiguous()
        for name, value in identity.trainable_state(encoder).items()
        if not (merge and name.startswith("backbone."))
    }
    identity.check_finite(state)
    joined = len(chosen) if encoder.aggregate_dim > encoder.embed_dim else 1
    config = {
        "model_type": MODEL_TYPE,
        "settings": settings,
        "backbone_included": included,
        "paths": chosen,
        "embed_dim": encoder.embed_dim,
        "aggregate_dim": encoder.embed_dim * joined,
        **{name: about[name] for name in ABOUT},
    }
    with atomic_write(folder) as unfinished:
        unfinished.mkdir()
        written: Any = encoder.backbone
        if included:
            _save_base(written, unfinished / BACKBONE_DIR, merged_path=chosen[0] if merge else None)
            if merge and len(chosen) == 1 and not settings.get("prefix_length"):
                _write_stock_modules(unfinished / BACKBONE_DIR, encoder.embed_dim)
            written = _build({**settings, "backbone": str(unfinished / BACKBONE_DIR)}).backbone
        elif isinstance(encoder, ParallelEncoder):
            encoder.processor.save_pretrained(unfinished / PROCESSOR_DIR)
        shown = source if portable(source, folder) == source else Path(source).name
        config["backbone"] = identity.backbone_fingerprint(written) | {"name": shown}
        save_file(state, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        config["files"] = identity.file_hashes(unfinished)
        config = portable(config, folder)
        (unfinished / "README.md").write_text(model_card(config, scores, card), encoding="utf-8")
        _write_json(unfinished / CONFIG_FILE, identity.sealed(config))
        _write_for_sentence_transformers(unfinished, about)


def _write_stock_modules(folder: Path, embed_dim: int) -> None:
    """Say in sentence-transformers' files that the last token is pooled and normalised; servers read them."""
    kinds = ("Transformer", "Pooling", "Normalize")
    places = enumerate(zip(kinds, ("", "1_Pooling", "2_Normalize"), strict=True))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in places
    ]
    _write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": embed_dim, "pooling_mode_lasttoken": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def _write_for_sentence_transformers(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what makes a folder one that ``SentenceTransformer`` loads."""
    module = "parallel_decoupling.sentence_transformers.PathEmbedding"
    _write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module}])
    config = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": about["query_instruction"], "document": about["candidate_instruction"]},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    _write_json(folder / "config_sentence_transformers.json", config)


def _load_checkpoint(path: str | Path) -> tuple[Encoder, dict[str, Any]]:
    file = run_checkpoint.checkpoint_file(path)
    content = run_checkpoint.read_checkpoint(file)
    settings, stored = content["hyper_parameters"], content["state_dict"]
    encoder = _build({**settings, "revision": settings["backbone_revision"]})
    start = "encoder."
    state = {name.removeprefix(start): value for name, value in stored.items() if name.startswith(start)}
    identity.check_fingerprint(content["backbone"], identity.backbone_fingerprint(encoder.backbone))
    identity.load_trainable_state(encoder, state)
    about = {"settings": settings, "images": content["data"], "run": run_checkpoint.run_info(content)}
    return encoder, {**settings, **about}


def _load_folder(folder: Path, download: bool = False) -> tuple[Encoder, dict[str, Any]]:
    file = folder / CONFIG_FILE
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    run_checkpoint.check_schema(Config, sealed, f"{folder} is not a model that save_pretrained wrote")
    config: dict[str, Any] = located(identity.check_seal(sealed, file), folder)
    found = identity.file_hashes(folder)
    read = {name for name in found if name.split("/")[0] in (PROCESSOR_DIR, BACKBONE_DIR)}
    names = sorted({*config["files"], *read})
    if changed := ", ".join(name for name in names if found.get(name) != config["files"].get(name)):
        problem = "are missing, damaged, or were changed or added after the export"
        raise ValueError(f"{folder}: {changed} {problem}")
    settings = dict(config["settings"])
    if config["backbone_included"]:
        settings["backbone"] = str(folder / BACKBONE_DIR)
    elif not is_open_clip(settings["backbone"]):
        settings["local_files_only"] = not download
    # any initialisation will do, as it is replaced; of meta-prompts only eight exist
    encoder = _build({**settings, "prefix_init": "random"})
    if "local_files_only" in settings:
        source = folder / PROCESSOR_DIR
        encoder.processor = load_processor(source, encoder.backbone.config, local_files_only=True)
        cast(Any, encoder.backbone).processor = encoder.processor
    identity.check_fingerprint(config["backbone"], identity.backbone_fingerprint(encoder.backbone))
    identity.load_trainable_state(encoder, load((folder / WEIGHTS_FILE).read_bytes()))
    return encoder, config


def _build(settings: Mapping[str, Any]) -> Encoder:
    """Build an encoder from plain settings, of which there may be more."""
    given = dict(settings)
    for name, kind in (("adapter", AdapterConfig), ("family", Family)):
        if given.get(name) is not None:
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in given[name].items()}
            given[name] = cast(Any, kind)(**values)
    return encoders.build_encoder(settings["backbone"], given)


def _settings(encoder: Encoder, *, included: bool, merge: bool) -> dict[str, Any]:
    """Return what ``_build`` needs to build an encoder again, if it can be."""
    backbone = encoder.backbone
    settings = {
        "backbone": encoders.absolute_name(backbone.name),
        "revision": backbone.revision,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "adapter": asdict(AdapterConfig(kind="frozen") if merge else backbone.adapter),
    }
    quantized = bool(getattr(backbone.base, "is_quantized", False))
    if included and (quantized or not isinstance(encoder, ParallelEncoder)):
        place = "beside its folder if it is a local one"
        advice = f"export without merge_adapters and include_backbone, and {place}"
        raise ValueError(f"an OpenCLIP model or a quantized backbone is referred to by its name: {advice}")
    if not isinstance(encoder, ParallelEncoder):
        return settings
    backbone = encoder.backbone
    if backbone.initial_adapter is not None and not merge:
        reason = f"as {CONFIG_FILE} does not hold the settings of {backbone.initial_adapter}"
        raise ValueError(f"export a continued adapter with merge_adapters=True, {reason}")
    known = FAMILIES.get(backbone.config.model_type)
    listed = known is not None and known.resolved(backbone.base, backbone.processor) == backbone.family
    eager = cast(Any, backbone.language_model).config._attn_implementation == "prefix_eager"
    return {
        **settings,
        "attention": "eager" if eager else "sdpa",  # which work on every machine
        "quantization": "4bit" if quantized else None,
        "family": None if listed else asdict(backbone.family),
        "prefix_length": encoder.prefix_length,
        "prefix_layers": encoder.prefix_layers,
        "prefix_type": encoder.prefix_type,
        "aggregation": encoder.aggregation,
    }


@torch.no_grad()
def _save_base(backbone: Backbone, folder: Path, *, merged_path: int | None) -> None:
    """Write the stock base model and its processor, with the adapters of one path merged, or without them."""
    base = cast(Any, backbone.base)
    own = {name: value for name, value in base.state_dict().items() if "lora_" not in name}
    state = {name.replace(".base_layer.", "."): value for name, value in own.items()}
    for name, layer in {} if merged_path is None else adapted_layers(base).items():
        if isinstance(layer, PathLoRA):
            assert merged_path is not None
            state[f"{name}.weight"] = layer.merged_weight(merged_path)
            continue
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge()
        state[f"{name}.weight"] = weight.detach().clone()
        layer.unmerge()
        weight.copy_(before)  # to the bit
    with torch.device("meta"):
        plain = type(base)(deepcopy(base.config))
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
