from __future__ import annotations

import json
import warnings
from copy import deepcopy
from hashlib import sha256
from typing import Any

import pytest
import torch

from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.checkpoint import (
    backbone_fingerprint,
    check_fingerprint,
    load_trainable_state,
    trainable_state,
)
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.model.test_attention import ROWS
from tests.support.tiny import save_tiny_backbone, tiny_inputs


def make(folder: str, kind: Any = "lora", **options: Any) -> ParallelEncoder:
    backbone = load_backbone(folder, adapter=AdapterConfig(kind=kind))
    return ParallelEncoder(backbone, aggregation="learned", **options)


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "full"])
def test_round_trip_is_bit_equal(tiny_backbone_dir: str, kind: str, tmp_path: Any) -> None:
    trained = make(tiny_backbone_dir, kind)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = trainable_state(trained)
    assert set(state) == {name for name, p in trained.named_parameters() if p.requires_grad}
    torch.save(state, tmp_path / "state.pt")
    fresh = make(tiny_backbone_dir, kind, seed=1)
    inputs = tiny_inputs(trained.processor, ROWS)
    assert not torch.equal(fresh(inputs), trained(inputs))
    load_trainable_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(inputs), trained(inputs))
    assert torch.equal(fresh.aggregate(fresh(inputs)), trained.aggregate(trained(inputs)))


def test_state_is_a_copy(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir)
    state = trainable_state(encoder)
    with torch.no_grad():
        encoder.prefixes.key_values.add_(1)
    assert not torch.equal(state["prefixes.key_values"], encoder.prefixes.key_values)


def test_names_and_shapes_that_do_not_fit_raise_and_change_nothing(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir)
    before = trainable_state(encoder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in zeros.items() if name != "prefixes.key_values"}
    for state, message in (
        (missing, r"missing \['prefixes.key_values'\]"),
        ({**zeros, "extra.weight": torch.zeros(1)}, r"unexpected \['extra.weight'\]"),
        ({**zeros, "path_logits": torch.zeros(3)}, "path_logits"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trainable_state(encoder, state)
    for name, tensor in trainable_state(encoder).items():
        assert torch.equal(tensor, before[name])


def test_fingerprint_tells_backbones_apart_whatever_trains_or_dtype(
    tiny_backbone_dir: str, tmp_path: Any
) -> None:
    fingerprint = backbone_fingerprint(load_backbone(tiny_backbone_dir))
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    for options in ({"adapter": AdapterConfig(kind="frozen")}, {"dtype": "bfloat16"}, {"attention": "eager"}):
        check_fingerprint(fingerprint, backbone_fingerprint(load_backbone(tiny_backbone_dir, **options)))
    other = load_backbone(save_tiny_backbone(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="frozen weights differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(other))
    changed = load_backbone(tiny_backbone_dir)
    with torch.no_grad():
        changed.base.get_submodule("language_model.norm").weight[3] += 0.1
    with pytest.raises(ValueError, match="frozen weights differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(changed))


def test_fingerprint_follows_a_moved_folder(tiny_backbone_dir: str, tmp_path: Any) -> None:
    moved = save_tiny_backbone(tmp_path / "moved")
    check_fingerprint(*(backbone_fingerprint(load_backbone(name)) for name in (tiny_backbone_dir, moved)))


@pytest.fixture
def backbone(tiny_backbone_dir: str) -> Backbone:
    return load_backbone(tiny_backbone_dir)


def written_before(
    backbone: Backbone, *, transformers_version: str = "5.22.2", **vision: Any
) -> dict[str, Any]:
    """The fingerprint of the same weights under another transformers, with other defaults of the vision."""
    other = deepcopy(backbone)
    for name, value in vision.items():
        setattr(other.config.vision_config, name, value)
    return backbone_fingerprint(other) | {"transformers_version": transformers_version}


def test_a_default_that_another_transformers_added_is_one_warning(backbone: Backbone) -> None:
    """As 5.23.0 added ``vision_use_head`` to SigLIP's config; here both ways around."""
    old, new = (
        written_before(backbone, vision_use_head=True, other_default=None),
        backbone_fingerprint(backbone),
    )
    assert old["sha256"] != new["sha256"]
    assert old["weights_sha256"] == new["weights_sha256"]
    for stored, current in ((old, new), (new, old)):
        with pytest.warns(UserWarning, match="5.22.2") as caught:
            check_fingerprint(stored, current)
        assert len(caught) == 1
        assert "vision_config.other_default, vision_config.vision_use_head" in str(caught[0].message)


def test_a_changed_value_of_the_config_is_refused_whatever_the_version(backbone: Backbone) -> None:
    old, new = written_before(backbone, hidden_act="relu", new_default=1), backbone_fingerprint(backbone)
    with pytest.raises(ValueError, match="vision_config.hidden_act was 'relu' and is 'quick_gelu'"):
        check_fingerprint(old, new)


def test_within_one_version_of_transformers_every_difference_is_refused(backbone: Backbone) -> None:
    new = backbone_fingerprint(backbone)
    same_version = {"transformers_version": new["transformers_version"]}
    with pytest.raises(ValueError, match="only one has vision_config.own"):
        check_fingerprint(written_before(backbone, own=1, **same_version), new)
    with pytest.raises(ValueError, match="the file was changed"):
        check_fingerprint(new | {"sha256": "0" * 64}, new)


def test_other_weights_are_refused_whatever_the_version(backbone: Backbone) -> None:
    old = written_before(backbone, vision_use_head=True)
    with torch.no_grad():
        backbone.base.get_submodule("language_model.norm").weight[3] += 0.1
    with pytest.raises(ValueError, match="frozen weights differ"):
        check_fingerprint(old, backbone_fingerprint(backbone))


def without_config(fingerprint: dict[str, Any], **values: Any) -> dict[str, Any]:
    """As the first versions of this package wrote it."""
    kept = ("name", "revision", "model_type", "num_frozen", "sha256")
    return {name: fingerprint[name] for name in kept} | values


def test_old_fingerprints_without_a_config(backbone: Backbone, tiny_backbone_dir: str) -> None:
    """Of one hash over config and weights; a commit of the hub says that the weights are the same."""
    new = backbone_fingerprint(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fingerprint(without_config(new), new)
    other = {"sha256": "0" * 64}
    with pytest.raises(ValueError, match=r"does not tell which.*save it again"):
        check_fingerprint(without_config(new, **other), new)
    hub = new | {"name": "owner/model", "revision": "a" * 40}
    with pytest.warns(UserWarning, match="only the config differs"):
        check_fingerprint(without_config(hub, **other), hub)
    for changed in ({"revision": "b" * 40}, {"name": "owner/other"}, {"num_frozen": 1}):
        with pytest.raises(ValueError, match="does not tell which"):
            check_fingerprint(without_config(hub, **other, **changed), hub)
    branch = hub | {"revision": "main"}
    with pytest.raises(ValueError, match="does not tell which"):
        check_fingerprint(without_config(branch, **other), branch)
    full = backbone_fingerprint(load_backbone(tiny_backbone_dir, adapter=AdapterConfig(kind="full")))
    assert full["num_frozen"] == 0
    with pytest.warns(UserWarning, match="only the config differs"):
        check_fingerprint(without_config(full, **other), full)


def test_sha256_is_what_the_first_versions_hashed(backbone: Backbone) -> None:
    fingerprint = backbone_fingerprint(backbone)
    digest = sha256(json.dumps(fingerprint["config"], sort_keys=True).encode())
    for name, parameter in sorted(backbone.base.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name.replace('.base_layer', '')} {list(parameter.shape)}".encode())
            digest.update(parameter.detach().bfloat16().view(torch.int16).numpy().tobytes())
    assert fingerprint["sha256"] == digest.hexdigest()


def test_training_does_not_change_the_fingerprint(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir, "dora")
    before = backbone_fingerprint(encoder.backbone)
    with torch.no_grad():
        for parameter in encoder.adapter_parameters():
            parameter.add_(1)
    assert backbone_fingerprint(encoder.backbone) == before
