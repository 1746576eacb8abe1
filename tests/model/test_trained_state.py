from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.identity import load_trainable_state, trainable_state
from tests.model.test_attention import ROWS
from tests.support.tiny import tiny_inputs


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
