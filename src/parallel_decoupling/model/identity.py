"""The weights of a model that train, and what identifies weights, a backbone, a processor and rows.

This is the only file that hashes for identity.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decoupling.batch import RawInput
from parallel_decoupling.distributed import shard_like, whole
from parallel_decoupling.files import MACHINE_ERRORS, reading
from parallel_decoupling.model.path_lora import PathLoRA

PER_PATH = re.compile(r"^prefixes\.|^path_(logits|maps)$|\.path_lora_[AB]$")
"""The names of parameters whose first dimension is the path."""
SAMPLED_VALUES = 2**18
"""Larger backbone tensors are hashed at this many evenly spaced values, so that billions take seconds."""
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")
"""Config entries that say how or from where a model was loaded, not what it is."""
SEAL = "content_sha256"
"""Key of the hash by which a file's plain values are known to be those that were written."""
PACKAGES = ("parallel-decoupling", "torch", "transformers")  # packages whose version may change an embedding


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return CPU copies of exactly the trainable tensors, by parameter name."""
    trained = _trained(model).items()
    return {name: whole(parameter.detach()).to("cpu", copy=True) for name, parameter in trained}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state from ``trainable_state`` into a model that was built with the same settings.

    When names or shapes differ, or a number is not finite, it is a ValueError and nothing is changed.
    """
    wanted = _trained(model)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = {name: (list(state[name].shape), list(wanted[name].shape)) for name in wanted if name in state}
    reshaped = [f"{name} {old} instead of {new}" for name, (old, new) in shapes.items() if old != new]
    if missing or unexpected or reshaped:
        found = f"missing {missing}, unexpected {unexpected}, wrong shape {reshaped}"
        advice = "build the model with the settings it was trained with"
        raise ValueError(f"the stored weights do not fit this model: {found}; {advice}")
    check_finite(state)
    for name, parameter in wanted.items():
        parameter.copy_(shard_like(state[name], parameter))


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if weights have an infinite number or NaN, which would be all that they give."""
    if broken := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"weights are not finite: {', '.join(broken)}; take an earlier checkpoint")


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: their names, shapes, dtypes and every bit, in any order."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return plain values with a hash of all of them, and of tensors that belong to them."""
    values = {key: value for key, value in content.items() if key != SEAL}
    weights = None if tensors is None else weights_hash(tensors)
    digest = sha256(json.dumps([values, weights], sort_keys=True, default=str).encode())
    return {**values, SEAL: digest.hexdigest()}


def check_seal(
    content: Mapping[str, Any], where: str | Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Return what was ``sealed``, without the hash; a ``ValueError`` if anything of it has changed since."""
    values = sealed(content, tensors)
    if content.get(SEAL) != values.pop(SEAL):
        raise ValueError(f"{where} is damaged, or was changed after it was written: its hash does not fit")
    return values


def file_hashes(folder: Path) -> dict[str, str]:
    """Return SHA-256s by name: of a folder's own weights, and of all but weights in the folders inside it."""
    inside = (file for file in folder.glob("*/**/*") if file.suffix != ".safetensors")
    files = filter(Path.is_file, (*folder.glob("*.safetensors"), *inside))
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def path_hashes(encoder: Any) -> list[str]:
    """Return a SHA-256 of the weights behind every path: those that all paths share, and its own.

    Weights count rounded to bfloat16, large tensors at evenly spaced values. Call it on all ranks at once.

    Relations:
        An exported folder has those of its checkpoint and ``paths[n]``, except with merged adapters.
    """
    shared, own = sha256(), {}
    for name, parameter in sorted(encoder.named_parameters()):
        value = whole(parameter.detach())
        if PER_PATH.search(name):
            own[name] = value
        else:
            shared.update(_sampled(name, value))
    hashes = []
    for path in range(encoder.num_paths):
        digest = shared.copy()
        for name, value_N in own.items():
            digest.update(_sampled(name, value_N[path]))
        hashes.append(digest.hexdigest())
    return hashes


def backbone_fingerprint(backbone: Any) -> dict[str, Any]:
    """Identify the frozen part of a backbone, in plain types; ``sha256`` is of config and frozen weights.

    Weights count rounded to bfloat16. Call it before they are sharded.
    """
    loaded = backbone.config if isinstance(backbone.config, dict) else backbone.config.to_dict()
    config = json.dumps(_flat(loaded), sort_keys=True, default=str)
    both, weights = sha256(config.encode()), sha256()
    for name, parameter in sorted(backbone.base.named_parameters()):
        if not parameter.requires_grad:
            content = _sampled(name.replace(".base_layer", ""), parameter.detach())
            both.update(content)
            weights.update(content)
    return {
        "name": backbone.name,
        "revision": backbone.revision,
        "sha256": both.hexdigest(),
        "weights_sha256": weights.hexdigest(),
        "config": json.loads(config),
        "transformers_version": loaded.get("transformers_version"),
        "prompt": asdict(template) if (template := getattr(backbone, "template", None)) else None,
    }


def check_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a stored and a new ``backbone_fingerprint`` are of the same backbone.

    The config holds class defaults too, of which a release of transformers adds or removes some: between two
    versions a warning names the keys that only one of them has.
    """
    if stored["prompt"] != current["prompt"]:
        raise ValueError(f"trained with the prompt {stored['prompt']}: set model.family.prompt to that")
    if stored["sha256"] == current["sha256"]:
        return
    trained, loaded = (f"{each['name']!r} (revision {each['revision']})" for each in (stored, current))
    differ = f"the weights were trained on backbone {trained}, but {loaded} was loaded: "
    if stored["weights_sha256"] != current["weights_sha256"]:
        raise ValueError(f"{differ}frozen weights differ; load the backbone it was trained on")
    old, new = stored["transformers_version"], current["transformers_version"]
    then, now = stored["config"], current["config"]
    both, one_sided = sorted(then.keys() & now.keys()), sorted(then.keys() ^ now.keys())
    changed = [f"{key} was {then[key]!r} and is {now[key]!r}" for key in both if then[key] != now[key]]
    if changed or old == new:
        found = "; ".join(changed + [f"only one has {key}" for key in one_sided]) or "the file was changed"
        raise ValueError(f"{differ}config differs: {found}; load the backbone it was trained on")
    if one_sided:
        found = f"only one of them has {', '.join(one_sided)} in the config of {current['name']!r}"
        versions = f"the weights were written with transformers {old}, and {new} is installed"
        warnings.warn(f"{versions}: {found}. All else is equal.", stacklevel=2)


def processor_hash(processor: Any) -> str:
    """Identify a processor and its tokenizer by the files they save, vocabulary included.

    Padding and truncation of the last call do not count. Of an OpenCLIP processor the vocabulary counts.
    """
    if not hasattr(processor, "save_pretrained"):
        tokenizer: Any = getattr(processor.tokenizer, "tokenizer", processor.tokenizer)
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer.encoder
        about = [type(tokenizer).__name__, processor.context_length, sorted(vocabulary.items())]
        return sha256(json.dumps(about).encode()).hexdigest()
    digest = sha256()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                if file.name == "tokenizer.json":
                    kept = {**json.loads(content), "padding": None, "truncation": None}
                    content = json.dumps(kept, sort_keys=True).encode()
                digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def rows_hash(rows: Iterable[RawInput], *, files: bool = True, fields: bytes = b"") -> str:
    """Return a SHA-256 of inputs, texts and images in order, and of ``fields`` that belong to them.

    An image file counts by the last two parts of its path, so that a data set may move, and with ``files``
    by its bytes.
    """
    digest = sha256(fields)
    for row in rows:
        images = [_image_content(image, files) for image in row.pictures]
        digest.update(json.dumps([row.text, row.fixed, images]).encode() + b"\n")
    return digest.hexdigest()


def encoder_identity(
    encoder: Any, *, fingerprint: Mapping[str, Any] | None = None, **conditions: Any
) -> dict[str, Any]:
    """Identify what turns inputs into embeddings. Call it on all ranks at once.

    ``fingerprint`` is that of its backbone, needed if it is sharded; ``conditions`` are further plain values
    that change embeddings, such as precision or the image size. ``sha256`` is of all that is known.
    """
    parts: dict[str, Any] = {
        "weights_sha256": weights_hash(trainable_state(encoder)),
        "path_sha256": path_hashes(encoder),
        "backbone_sha256": (fingerprint or backbone_fingerprint(encoder.backbone))["sha256"],
        "processor_sha256": processor_hash(encoder.processor),
    }
    scales = {
        name: scale
        for name, module in encoder.named_modules()
        if isinstance(scale := getattr(module, "scaling", None), dict) or isinstance(module, PathLoRA)
    }
    family = getattr(encoder.backbone, "family", None)
    packages = PACKAGES if family else (*PACKAGES, "open_clip_torch")
    about = {
        **parts,
        "conditions": conditions,
        "dtype": str(encoder.backbone.dtype),
        "family": asdict(family) if family else None,
        "adapter_scales": scales,
        "versions": {name: version(name) for name in packages},
    }
    total = sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return {"sha256": total, **parts}


def about_encoder(encoder: Any, **conditions: Any) -> dict[str, Any]:
    """Return what stored embeddings say of a model: ``encoder_identity``, and how paths are aggregated."""
    aggregation: dict[str, Any] = {"kind": getattr(encoder, "aggregation", "mean")}
    if (logits := getattr(encoder, "path_logits", None)) is not None:
        aggregation["weights"] = logits.detach().float().softmax(dim=0).tolist()
    identity = encoder_identity(encoder, **conditions)
    return {"identity": identity, "num_paths": encoder.num_paths, "aggregation": aggregation}


def _sampled(name: str, tensor: Tensor) -> bytes:
    """Return name, shape and evenly spaced values of a tensor, rounded to bfloat16."""
    stride = max(1, -(-tensor.numel() // SAMPLED_VALUES))
    rounded = tensor.flatten()[::stride].to(torch.bfloat16).contiguous().cpu()
    return f"{name} {list(tensor.shape)}".encode() + rounded.view(torch.int16).numpy().tobytes()


def _flat(config: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Return a nested config by dotted keys, without what says only how or from where it was loaded."""
    flat: dict[str, Any] = {}
    for key in config.keys() - set(VOLATILE_CONFIG):
        is_group = isinstance(config[key], dict)
        flat[f"{start}{key}"] = "a group" if is_group else config[key]
        flat |= _flat(config[key], f"{start}{key}.") if is_group else {}
    return flat


def _image_content(image: Any, files: bool) -> list[Any]:
    if not isinstance(image, str):
        return [image.mode, *image.size, image.getpalette(), sha256(image.tobytes()).hexdigest()]
    name = "/".join(Path(image).parts[-2:])
    if not files:
        return [name]
    try:
        if Path(image).is_file():  # a pipe would be waited for
            with reading(image):
                return [name, sha256(Path(image).read_bytes()).hexdigest()]
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
    return [name, "unreadable"]
