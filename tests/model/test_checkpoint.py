from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
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
    with pytest.raises(ValueError, match="config or frozen weights differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(other))
    changed = load_backbone(tiny_backbone_dir)
    with torch.no_grad():
        changed.base.get_submodule("language_model.norm").weight[3] += 0.1
    with pytest.raises(ValueError, match="differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(changed))


def test_fingerprint_follows_a_moved_folder(tiny_backbone_dir: str, tmp_path: Any) -> None:
    moved = save_tiny_backbone(tmp_path / "moved")
    check_fingerprint(*(backbone_fingerprint(load_backbone(name)) for name in (tiny_backbone_dir, moved)))


def test_training_does_not_change_the_fingerprint(tiny_backbone_dir: str) -> None:
    encoder = make(tiny_backbone_dir, "dora")
    before = backbone_fingerprint(encoder.backbone)
    with torch.no_grad():
        for parameter in encoder.adapter_parameters():
            parameter.add_(1)
    assert backbone_fingerprint(encoder.backbone) == before
