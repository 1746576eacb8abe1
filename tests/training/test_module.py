"""The training step against plain references, on a random-weight tiny Qwen2-VL and a tiny benchmark."""

import inspect
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.optimization import MIConfig
from parallel_decoupling.training.settings import CONFIGS, SHAPES_EMBEDDINGS, SHAPES_WEIGHTS
from tests.model.test_encoder import join
from tests.support.fit import (
    ONE_PATH,
    Recorder,
    RecordingEmbedder,
    assert_equal,
    first_batch,
    make_trainer,
    small_data,
    small_embedder,
    trained,
)

OWN_ADAPTERS = {"adapter": {"per_path": True}, "prefix_length": 0}
NO_CLIP = {"clip_norm": 0.0}
NO_RAMP = {"warmup_steps": 0, "ramp_steps": 0}


def plain_embeddings(model: Any, inputs: EncoderInputs) -> Tensor:
    states = model(**inputs.tokens, **join(inputs), use_cache=False).last_hidden_state
    return F.normalize(states[:, -1], dim=-1)  # left padding


def test_one_path_without_prefix_is_the_plain_single_path_recipe(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    settings = {**ONE_PATH, "adapter": {"kind": "full"}, "temperature": 0.5, "optimizer": NO_CLIP}
    module = small_embedder(tiny_backbone_dir, kind=RecordingEmbedder, **settings)
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_steps=1).fit(module, small_data(tiny_mmeb_dir))

    model = AutoModel.from_pretrained(tiny_backbone_dir)
    batch = first_batch(module, tiny_mmeb_dir)
    logits = plain_embeddings(model, batch.query) @ plain_embeddings(model, batch.candidate).T / 0.5
    ids = batch.candidate_ids
    same = (ids.unsqueeze(0) == ids.unsqueeze(1)) & ~torch.eye(len(ids), dtype=torch.bool)
    loss = F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(ids)))
    loss.backward()

    assert recorder.values[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert isinstance(module, RecordingEmbedder)
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    prefix = "encoder.backbone.base."
    assert {name.removeprefix(prefix) for name in module.gradients} == reference.keys()
    for name, gradient in module.gradients.items():
        torch.testing.assert_close(gradient, reference[name.removeprefix(prefix)], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_sum_of_its_logged_terms(fit: Any) -> None:
    distilled = {"distillation_weight": 0.3, "distillation_start": 2}
    _, logged = fit(4, mi_weight=0.4, aggregate_weight=0.7, **distilled)
    assert ["train/distillation" in values for values in logged] == [False, False, True, True]
    assert [values["train/mi_weight"] for values in logged] == pytest.approx([0.0, 0.0, 0.2, 0.4])
    for values in logged:
        paths = (values["train/contrastive_path_0"] + values["train/contrastive_path_1"]) / 2
        mi = values["train/mi_weight"] * values["train/mi_pair_0_1"]
        expected = paths + 0.7 * values["train/contrastive_aggregate"] + mi
        expected += 0.3 * values.get("train/distillation", 0.0)
        assert values["train/loss"] == pytest.approx(expected, rel=1e-5)
        assert values["train/estimator_nll"] < values["train/estimator_nll_held_out"]


def test_hard_negatives_of_rows_that_have_none_change_nothing(fit: Any) -> None:
    values, gradients = [], []
    for number in (0, 2):
        module, (logged,) = fit(
            data={"hard_negatives": number},
            kind=RecordingEmbedder,
            temperature=0.5,
            symmetric=True,
            mi=NO_RAMP,
        )
        values.append({name: value for name, value in logged.items() if not name.startswith("compute/")})
        gradients.append(module.gradients)
    assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


class Watch(RecordingEmbedder):
    """Checks at both steps what the other one must not touch."""

    def _fit_estimator(self, pairs: Any) -> tuple[Tensor, Tensor]:
        before = {name: p.detach().clone() for name, p in self.encoder.named_parameters()}
        estimator = [p.detach().clone() for p in self.mutual_information.parameters()]
        result = super()._fit_estimator(pairs)
        assert all(torch.equal(p, before[name]) for name, p in self.encoder.named_parameters())
        assert all(p.grad is None for p in self.encoder.parameters())
        assert not all(map(torch.equal, estimator, self.mutual_information.parameters()))
        return result

    def _main_step(self) -> None:
        before = [p.detach().clone() for p in self.mutual_information.parameters()]
        assert all(p.grad is None for p in self.mutual_information.parameters())
        super()._main_step()
        assert all(map(torch.equal, before, self.mutual_information.parameters()))
        assert all(p.requires_grad for p in self.mutual_information.parameters())
        self.watched = True


def test_neither_step_touches_the_other_ones_parameters(fit: Any) -> None:
    module, _ = fit(3, kind=Watch, mi=NO_RAMP)
    assert module.watched


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"prefix_type": "shallow"},
        OWN_ADAPTERS,
        {"matryoshka_dims": [16, 8]},
        {"mi": {"kind": "vclub_given_target", **NO_RAMP}},
    ],
)
def test_chunks_train_like_one_graph(fit: Any, extra: dict[str, Any]) -> None:
    settings = {"mi": NO_RAMP, "optimizer": NO_CLIP, "aggregation": "learned", "temperature": 0.2, **extra}
    whole, _ = fit(kind=RecordingEmbedder, **settings)
    chunked, _ = fit(kind=RecordingEmbedder, **settings, chunk_size=3)
    torch.testing.assert_close(chunked.gradients, whole.gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_length": 0}, "set num_paths=1"),
        ({"num_paths": 1}, "set aggregate_weight=0"),
        ({"mi": {"kind": "none"}, "mi_weight": 0.1}, "set mi_weight=0"),
        ({"mi": {"hidden_size": 0}}, "mi.hidden_size must be 1 or more"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate must be 0 or more and finite"),
    ],
)
def test_impossible_settings_say_what_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PDFEmbedder(**changes)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_other_precisions_are_refused(tiny_backbone_dir: str, precision: str) -> None:
    module = small_embedder(tiny_backbone_dir)
    module._trainer = SimpleNamespace(strategy=None, precision=precision)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"precision={precision} .*use 32-true or bf16-mixed"):
        module.setup("test")


def test_full_training_in_half_precision_is_refused_and_scoring_is_not(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = small_embedder(tiny_backbone_dir, adapter={"kind": "full"}, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"model\.dtype=float32 with trainer\.precision=bf16-mixed"):
        make_trainer(tmp_path, max_steps=1).fit(module, small_data(tiny_mmeb_dir))
    module._trainer = SimpleNamespace(strategy=None, precision="32-true")  # type: ignore[assignment]
    module.setup("test")


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    class Broken(PDFEmbedder):
        def _main_step(self) -> None:
            if self.progress.steps_done == 2:
                parameter = self.trainables()["prefixes"][0]
                assert parameter.grad is not None
                parameter.grad.view(-1)[0] = float("nan")
                self.before = trained(self)
            super()._main_step()

    module = small_embedder(tiny_backbone_dir, kind=Broken)
    with pytest.raises(ValueError, match=r"main step 3 is not finite \(norm nan\)"):
        make_trainer(tmp_path, max_steps=4).fit(module, small_data(tiny_mmeb_dir))
    assert_equal(module.before, trained(module))


def test_matryoshka_at_the_full_dimension_alone_is_none(fit: Any) -> None:
    states = [trained(fit(2, matryoshka_dims=dims)[0]) for dims in (None, [32], [32, 4])]
    assert_equal(states[0], states[1])
    name = "encoder.prefixes.key_values"
    assert not torch.equal(states[0][name], states[2][name])


def test_learned_temperature_moves_and_a_fixed_one_does_not(fit: Any) -> None:
    for learn in (True, False):
        module, _ = fit(2, temperature=0.2, learn_temperature=learn)
        assert (module.temperature.item() != pytest.approx(0.2, abs=1e-6)) == learn


def test_weight_waits_then_ramps_in_a_straight_line() -> None:
    config = MIConfig(warmup_steps=2, ramp_steps=4)
    weights = [config.weight_at(step, 0.4) for step in range(9)]
    assert weights == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert MIConfig(warmup_steps=0, ramp_steps=0).weight_at(0, 0.4) == 0.4
    assert MIConfig(warmup_steps=3, ramp_steps=0).weight_at(2, 0.4) == 0.0


def test_every_setting_that_is_listed_is_an_argument() -> None:
    arguments = inspect.signature(PDFEmbedder).parameters
    listed = {*SHAPES_WEIGHTS, *SHAPES_EMBEDDINGS}
    assert {name.partition(".")[0] for name in listed} <= arguments.keys()
    assert CONFIGS.keys() <= arguments.keys()
    options = {f"{name}.{each.name}" for name, kind in CONFIGS.items() for each in fields(kind)}
    assert {name for name in listed if "." in name} <= options
