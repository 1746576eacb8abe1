"""A trained encoder as a folder to share: safetensors and JSON, read without pickle and without network.

    config.json          sizes, backbone (name, revision, fingerprint), adapter, hash of the weights
    model.safetensors    prefixes of the exported paths, adapters, aggregation weights
    processor/           tokenizer and image processor; inside ``backbone/`` if there is one
    backbone/            only if asked for, or with merged adapters: the base model as transformers saves it

Here: these files. Elsewhere: instructions and prompts, the model card (``evaluation``), training checkpoints
(``checkpoint``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor

from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.backbone import Backbone, load_backbone
from parallel_decoupling.model.dual_backbone import absolute_name, is_dual_encoder, load_dual_backbone
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.families import FAMILIES, Family
from parallel_decoupling.model.identity import backbone_fingerprint, check_fingerprint, weights_hash
from parallel_decoupling.model.trained_state import PER_PATH, load_trainable_state, trainable_state

FORMAT = 1
MODEL_TYPE = "parallel_decoupling"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PROCESSOR_DIR, BACKBONE_DIR = "processor", "backbone"
ENCODER_OPTIONS = ("prefix_length", "prefix_layers", "prefix_type", "aggregation")
"""Options of ``ParallelEncoder`` beside the number of paths that say what an encoder computes."""


def save_encoder(
    encoder: ParallelEncoder | DualEncoder,
    folder: str | Path,
    *,
    paths: Sequence[int] | None = None,
    merge_adapters: bool = False,
    include_backbone: bool = False,
) -> dict[str, Any]:
    """Write weights and processor; the caller writes what is returned with ``write_config``, last.

    Args:
        encoder: not sharded; it is left as it is.
        folder: without a ``config.json``; made if missing.
        paths: which paths, in that order; None is all. The aggregate is then that of these paths.
        merge_adapters: add LoRA or DoRA to the base model and write that into ``backbone/``.
        include_backbone: write the base model into ``backbone/``; otherwise its name stands for it. A base
            model that was trained itself is always written.

    Returns:
        The content of ``config.json``, plain values.

    Raises:
        ValueError: the folder holds a model, a path that does not exist, or weights that cannot be written.

    Relations:
        ``load_encoder`` gives the same embeddings bit for bit, column n those of ``paths[n]``; with
        ``merge_adapters`` up to rounding.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} already holds a model ({CONFIG_FILE}); name another folder or empty it")
    chosen = _checked_paths(paths, encoder.num_paths)
    config: dict[str, Any] = {"model_type": MODEL_TYPE, "format": FORMAT, "paths": chosen}
    state = trainable_state(encoder)
    if isinstance(encoder, DualEncoder):
        config |= _save_dual(encoder, merge_adapters or include_backbone)
    else:
        merge = merge_adapters or encoder.backbone.adapter.kind == "full"
        _check_exportable(encoder.backbone, merge=merge, include=merge or include_backbone)
        folder.mkdir(parents=True, exist_ok=True)
        config |= _save_parallel(encoder, folder, merge=merge, include=merge or include_backbone)
        if merge:
            state = {name: value for name, value in state.items() if not name.startswith("backbone.")}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        name: (value[chosen] if name.startswith(PER_PATH) else value).contiguous()
        for name, value in state.items()
    }
    save_file(rows, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    several = encoder.aggregate_dim // encoder.embed_dim > 1
    config["embed_dim"] = encoder.embed_dim
    config["aggregate_dim"] = encoder.embed_dim * (len(chosen) if several else 1)
    config["weights_sha256"] = weights_hash(rows)
    return config


def write_config(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``, which makes the folder a model."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")


def is_pretrained(folder: str | Path) -> bool:
    """Whether a folder holds what ``save_encoder`` writes."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        ValueError: no folder, no exported model in it, or one of a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no folder {str(folder)!r}; name one that save_pretrained or lightning export wrote"
        )
    if not is_pretrained(folder):
        raise ValueError(
            f"{folder} holds no exported model: no {CONFIG_FILE} with model_type {MODEL_TYPE!r}; "
            "write one with save_pretrained or lightning export"
        )
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {config.get('format')!r}, this version reads {FORMAT}; "
            "update parallel-decoupling"
        )
    wanted = {"paths", "backbone", "adapter", "weights_sha256", "embed_dim", "aggregate_dim"}
    missing = sorted(wanted - config.keys())
    if missing:
        raise ValueError(f"{folder / CONFIG_FILE} lacks {missing}; export the model again")
    return config


def load_encoder(folder: str | Path) -> tuple[ParallelEncoder | DualEncoder, dict[str, Any]]:
    """Load what ``save_encoder`` wrote, on the CPU, and its ``config.json``.

    Nothing is unpickled or downloaded: a backbone from the hub must be in the local cache.

    Returns:
        The encoder in evaluation mode, and the config.

    Raises:
        ValueError: files that are missing or changed, or another backbone than the one trained on.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = _read_weights(folder / WEIGHTS_FILE, config["weights_sha256"])
    encoder: ParallelEncoder | DualEncoder
    if is_dual_encoder(config["backbone"]["name"]):
        encoder = _load_dual(config)
    else:
        encoder = ParallelEncoder(
            _load_backbone(folder, config),
            num_paths=len(config["paths"]),
            prefix_init="random",  # replaced; "meta" has no more than eight
            **config["encoder"],
        )
    try:
        load_trainable_state(encoder, state)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error
    encoder.eval()
    return encoder, config


def _checked_paths(paths: Sequence[int] | None, num_paths: int) -> list[int]:
    chosen = list(range(num_paths)) if paths is None else list(paths)
    wrong = [path for path in chosen if isinstance(path, bool) or path not in range(num_paths)]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        raise ValueError(f"paths must name some of 0 to {num_paths - 1}, each once, got {chosen}")
    return chosen


def _check_exportable(backbone: Backbone, *, merge: bool, include: bool) -> None:
    if include and getattr(backbone.base, "is_quantized", False):
        raise ValueError(
            "a quantized backbone is not written: export without merge_adapters and include_backbone"
        )
    if backbone.initial_adapter is not None and not merge:
        raise ValueError(
            f"the backbone goes on from the published adapter {backbone.initial_adapter!r}, whose settings "
            f"{CONFIG_FILE} does not hold: export with merge_adapters=True (--merge_adapters)"
        )


def _save_parallel(encoder: ParallelEncoder, folder: Path, *, merge: bool, include: bool) -> dict[str, Any]:
    backbone = encoder.backbone
    adapter = AdapterConfig(kind="frozen") if merge else backbone.adapter
    settings: dict[str, Any] = {
        "name": absolute_name(backbone.name),
        "revision": backbone.revision,
        "included": include,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": _attention(backbone),
        "quantization": "4bit" if getattr(backbone.base, "is_quantized", False) else None,
        "family": _own_family(backbone),
    }
    if include:
        _save_base(backbone, folder / BACKBONE_DIR, merge=merge)
        identified = load_backbone(str(folder / BACKBONE_DIR), adapter=adapter, **_loading(settings))
    else:
        backbone.processor.save_pretrained(folder / PROCESSOR_DIR)
        identified = backbone
    settings["fingerprint"] = backbone_fingerprint(identified) | {"name": backbone.name}
    return {
        "backbone": settings,
        "adapter": asdict(adapter),
        "encoder": {name: getattr(encoder, name) for name in ENCODER_OPTIONS},
    }


def _save_base(backbone: Backbone, folder: Path, *, merge: bool) -> None:
    """Write the stock base model and its processor; adapters are merged or left out."""
    base = cast(Any, backbone.base)
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if "lora_" not in name
    }
    if merge:
        for name in backbone.adapted_modules:
            state[f"{name}.weight"] = _merged_weight(base.get_submodule(name))
    with torch.device("meta"):
        plain = type(base)(deepcopy(base.config))
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    """Weight of a linear layer with its adapter in it; the layer stays as it was, to the bit."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge()
    merged = cast(Tensor, weight.detach().clone())
    layer.unmerge()
    weight.copy_(before)
    return merged


def _save_dual(encoder: DualEncoder, with_backbone: bool) -> dict[str, Any]:
    if with_backbone:
        raise ValueError(
            "an OpenCLIP model is always referred to by its name: export without merge_adapters and "
            "include_backbone"
        )
    backbone = encoder.backbone
    trains = any(parameter.requires_grad for parameter in backbone.parameters())
    settings = {
        "name": absolute_name(backbone.name),
        "included": False,
        "dtype": str(backbone.input_dtype).removeprefix("torch."),
        "fingerprint": backbone_fingerprint(backbone),
    }
    return {
        "backbone": settings,
        "adapter": asdict(AdapterConfig(kind="full" if trains else "frozen")),
        "encoder": {},
    }


def _load_dual(config: Mapping[str, Any]) -> DualEncoder:
    settings = config["backbone"]
    adapter = _adapter(config)
    backbone = load_dual_backbone(settings["name"], dtype=settings["dtype"], adapter=adapter)
    check_fingerprint(settings["fingerprint"], backbone_fingerprint(backbone))
    return DualEncoder(backbone)


def _load_backbone(folder: Path, config: Mapping[str, Any]) -> Backbone:
    settings = config["backbone"]
    if settings["included"]:
        source = folder / BACKBONE_DIR
        if not (source / "config.json").is_file():
            raise ValueError(f"{source} is missing: copy the whole exported folder")
        backbone = load_backbone(str(source), adapter=_adapter(config), **_loading(settings))
    else:
        source = folder / PROCESSOR_DIR
        if not source.is_dir():
            raise ValueError(f"{source} is missing: copy the whole exported folder")
        local = _without_network(settings["name"], settings["revision"])
        backbone = load_backbone(local, adapter=_adapter(config), **_loading(settings))
        backbone.name, backbone.revision = settings["name"], settings["revision"]
        backbone.processor = cast(Any, AutoProcessor).from_pretrained(source, local_files_only=True)
    check_fingerprint(settings["fingerprint"], backbone_fingerprint(backbone))
    return backbone


def _without_network(name: str, revision: str | None) -> str:
    """Where a backbone is on this machine; a folder's name is left for ``load_backbone`` to check."""
    if name == "tiny" or Path(name).is_absolute() or name.count("/") != 1:
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        at = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"backbone {name!r} is not in the local Hugging Face cache and nothing is downloaded here; "
            f"get it with: hf download {name}{at}"
        ) from error


def _read_weights(file: Path, sha256: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} is missing: copy the whole exported folder")
    try:
        state = load_safetensors(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    if weights_hash(state) != sha256:
        raise ValueError(f"{file} is not the file that was exported: its hash differs from {CONFIG_FILE}'s")
    return state


def _adapter(config: Mapping[str, Any]) -> AdapterConfig:
    values = dict(config["adapter"])
    values["targets"] = None if values["targets"] is None else tuple(values["targets"])
    return AdapterConfig(**values)


def _loading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``load_backbone`` beside the adapter."""
    options = {name: settings[name] for name in ("dtype", "attention", "quantization")}
    family: dict[str, Any] | None = settings["family"]
    if family is None:
        return options
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in family.items()
    }
    return options | {"family": Family(**values)}


def _attention(backbone: Backbone) -> str:
    """What works on every machine: eager stays eager, all others become sdpa."""
    eager = cast(Any, backbone.language_model).config._attn_implementation == "prefix_eager"
    return "eager" if eager else "sdpa"


def _own_family(backbone: Backbone) -> dict[str, Any] | None:
    """The family as plain values if it is not the table's."""
    known = FAMILIES.get(backbone.config.model_type)
    if known is not None and replace(backbone.family, blocks=known.blocks) == known:
        return None
    return asdict(backbone.family)
