"""The one encoding loop: order, batches, paths, shards, processes, and rows that cannot be used."""

import random
import zlib
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from parallel_decoupling.batch import EncoderInputs, RawInput, TokenLimit
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.evaluation import encode as encoding
from parallel_decoupling.evaluation.encode import BatchPlan, RowBatches, TokenEstimate, embed, encode_rows
from parallel_decoupling.model.turns import Turns
from tests.support.embedders import mixed_inputs, tiny_embedder

TEXTS = ["a", "a much longer text than the others", "bb", "", "middle length", "bb"]


class HashCollator:
    """Tokens are the bytes of the text, padded on the right; counts its calls."""

    images, processor, limit, video_token = ImagePolicy(), None, TokenLimit(), None

    def __init__(self) -> None:
        self.seen: list[list[RawInput]] = []

    def encode_inputs(self, inputs: list[RawInput]) -> EncoderInputs:
        self.seen.append(list(inputs))
        length = max(len(row.text) for row in inputs)
        rows = [list(row.text.encode()) for row in inputs]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        vision = tuple({"pixels": torch.zeros(1)} if row.images else {} for row in inputs)
        return EncoderInputs({"input_ids": ids, "attention_mask": (ids > 0).long()}, vision)

    def text_parts(self, row: RawInput) -> tuple[str, str, str]:
        return "", row.text, ""

    def encode_usable(self, inputs: list[RawInput]) -> tuple[EncoderInputs, dict[int, Any]]:
        return self.encode_inputs(inputs), {}


class HashEncoder(nn.Module):
    """Every text has one random unit vector per path, whatever the batch and the padding."""

    num_paths, embed_dim, aggregate_dim = 3, 5, 15

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.turns = nn.Parameter(torch.ones(())), Turns()
        self.frozen = nn.Dropout().eval()
        self.batches: list[int] = []
        self.modes: list[bool] = []

    def forward(self, inputs: EncoderInputs, paths: list[int] | None = None) -> Tensor:
        self.batches.append(len(inputs))
        self.modes.append(self.training)
        chosen = range(self.num_paths) if paths is None else paths
        rows = []
        for ids, mask in zip(inputs.tokens["input_ids"], inputs.tokens["attention_mask"], strict=True):
            seed = zlib.crc32(bytes(ids[mask.bool()].tolist()))
            rows.append(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))[list(chosen)])
        return F.normalize(torch.stack(rows), dim=-1) * self.scale

    def aggregate(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.flatten(1), dim=-1)


def encode_all(*args: Any, **options: Any) -> Tensor:
    return encode_rows(*args, **{"paths": "all", **options}).embeddings


def raw(texts: list[str]) -> list[RawInput]:
    return [RawInput(text) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_rows_come_back_in_order_whatever_the_batch_size(batch_size: int) -> None:
    encoder, texts = HashEncoder(), [text for text in TEXTS if text]
    one_by_one = torch.stack([encode_all(encoder, HashCollator(), raw([text]))[0] for text in texts])
    together = encode_all(encoder, HashCollator(), raw(texts), batch_size=batch_size)
    assert torch.equal(together, one_by_one)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert not together.is_inference(), "it can be used in training"


def test_selected_paths_are_the_columns_of_all() -> None:
    encoder, inputs = HashEncoder(), raw(["one", "two", "three"])
    every = encode_all(encoder, HashCollator(), inputs)
    assert every.shape == (3, 3, 5)
    assert torch.equal(encode_all(encoder, HashCollator(), inputs, paths=[2, 0]), every[:, [2, 0]])
    assert torch.equal(encode_all(encoder, HashCollator(), inputs, paths=1), every[:, 1])
    aggregate = encode_all(encoder, HashCollator(), inputs, paths="aggregate")
    torch.testing.assert_close(aggregate, F.normalize(every.flatten(1), dim=-1))


def test_encoding_is_in_eval_mode_and_restores_the_mode_of_every_module() -> None:
    encoder = HashEncoder().train()
    encoder.frozen.eval()
    encode_all(encoder, HashCollator(), raw(["text"]))
    assert encoder.modes == [False]
    encoder.forward = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        encode_all(encoder, HashCollator(), raw(["text"]))
    assert encoder.training
    assert not encoder.frozen.training


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (3, r"paths must name some of 0 to 2, got \[3\]"),
        (True, r"got \[True\]"),
        ([0.5], r"got \[0\.5\]"),
        (["0"], r"got \['0'\]"),
        ([], r"got \[\]"),
        ("mean", "'mean'; use 'all', 'aggregate'"),
    ],
)
def test_wrong_path_is_an_error(paths: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_all(HashEncoder(), HashCollator(), [], paths=paths)  # type: ignore[arg-type]


@pytest.mark.parametrize("concatenated", [True, False])
def test_truncated_embeddings_are_first_coordinates_and_their_aggregate(concatenated: bool) -> None:
    encoder, inputs = HashEncoder(), raw(["one", "two", "three"])
    if not concatenated:
        encoder.aggregate_dim = 5  # type: ignore[misc]
        encoder.aggregate = lambda paths: F.normalize(paths.mean(1), dim=-1)  # type: ignore[method-assign]
    every = encode_all(encoder, HashCollator(), inputs)
    short = torch.zeros(3, 3, 2)
    for row in range(3):
        for path in range(3):
            short[row, path] = every[row, path, :2] / every[row, path, :2].norm()
    options = {"truncate_dim": 2}
    torch.testing.assert_close(encode_all(encoder, HashCollator(), inputs, **options), short)
    torch.testing.assert_close(encode_all(encoder, HashCollator(), inputs, paths=1, **options), short[:, 1])
    torch.testing.assert_close(
        encode_all(encoder, HashCollator(), inputs, paths=[2], **options), short[:, [2]]
    )
    aggregate = encode_all(encoder, HashCollator(), inputs, paths="aggregate", **options)
    assert aggregate.shape == (3, 6 if concatenated else 2)
    torch.testing.assert_close(aggregate, encoder.aggregate(short))
    for paths in ("all", "aggregate", 1):
        whole = encode_all(encoder, HashCollator(), inputs, paths=paths)
        assert torch.equal(encode_all(encoder, HashCollator(), inputs, paths=paths, truncate_dim=5), whole)


def test_a_forward_pass_has_a_budget_of_tokens_and_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TOKENS_PER_PASS", 64)
    for lengths, passes in (
        ([20, 20, 20, 4, 4], [3, 2]),  # 80 with a fourth
        ([30, 30, 3, 3, 3], [2, 3]),  # 27 of padding with a third
        ([100, 100, 1], [1, 1, 1]),  # a row at least
        ([8] * 8, [8]),
    ):
        encoder, inputs = HashEncoder(), HashCollator().encode_inputs(raw(["x" * each for each in lengths]))
        embeddings_BND = embed(encoder, inputs, [2, 0])
        assert encoder.batches == passes
        assert torch.equal(embeddings_BND, HashEncoder()(inputs, [2, 0]))


def test_a_batch_that_exhausts_the_memory_is_halved_and_a_row_that_does_is_the_error() -> None:
    class Small(HashEncoder):
        """Has memory for two rows, and for none with a z."""

        def forward(self, inputs: EncoderInputs, paths: list[int] | None = None) -> Tensor:
            if len(inputs) > 2 or (inputs.tokens["input_ids"] == ord("z")).any():
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(inputs, paths)

    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert torch.equal(
        encode_all(Small(), HashCollator(), raw(texts)), encode_all(HashEncoder(), HashCollator(), raw(texts))
    )
    with pytest.raises(torch.OutOfMemoryError):
        encode_all(Small(), HashCollator(), raw([*texts, "z"]))
    broken = HashEncoder()
    broken.forward = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        encode_all(broken, HashCollator(), raw(texts))


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.set_default_dtype(torch.float64),  # a fixture sets it back
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
    ],
)
def test_what_is_set_around_a_call_makes_no_difference_and_stays(
    tiny_backbone_dir: str, surroundings: Any
) -> None:
    embedder, inputs = tiny_embedder(tiny_backbone_dir), mixed_inputs()
    expected = embedder.encode(inputs)
    with surroundings() or nullcontext():
        before = torch.get_default_device(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        found, cosines = embedder.encode(inputs), embedder.similarity(expected, expected.tolist())
        after = torch.get_default_device(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert before == after
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(cosines, expected @ expected.T)


# ---- the plan


LENGTHS = random.Random(0).choices(range(1, 40), k=50)
ROWS = [RawInput("word " * length) for length in LENGTHS]


def plans(world_size: int, **options: Any) -> list[list[Any]]:
    estimate = TokenEstimate(cast(Any, HashCollator()))
    return [
        list(BatchPlan(ROWS, estimate, 3, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("rows_per_shard", "finished"), [(None, ()), (None, (0,)), (8, ()), (8, (0, 3)), (8, range(7))]
)
def test_every_row_is_done_once_whatever_the_number_of_processes(
    world_size: int, rows_per_shard: int | None, finished: tuple[int, ...]
) -> None:
    batches = plans(world_size, rows_per_shard=rows_per_shard, finished=finished)
    assert len({len(each) for each in batches}) == 1, "as many steps on every process"
    assert len(batches[0]) >= 1, "a loader without batches would stop Lightning's loop"
    rows = [row for each in batches for place in each for row in place.rows]
    assert sorted(rows) == [row for row in range(50) if row // (rows_per_shard or 50) not in finished]
    alone = {place.rows for place in plans(1, rows_per_shard=rows_per_shard, finished=finished)[0]}
    assert {place.rows for each in batches for place in each} - {()} == alone - {()}, "the same batches"


def test_a_shard_is_one_process_s_from_its_longest_row_to_its_last_batch() -> None:
    (plan,) = plans(1, rows_per_shard=20)
    for shard in range(3):
        batches = [place for place in plan if place.shard == shard]
        rows = [row for place in batches for row in place.rows]
        assert sorted(rows) == list(range(20 * shard, min(20 * shard + 20, 50)))
        lengths = [LENGTHS[row] for row in rows]
        assert lengths == sorted(lengths, reverse=True)
        assert [place.last for place in batches] == [False] * (len(batches) - 1) + [True]
    assert [place.shard for place in plan] == sorted(place.shard for place in plan)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_named_by_workers_too_and_a_batch_of_them_has_a_stand_in(
    tiny_backbone_dir: str, num_workers: int
) -> None:
    collator = load_collator(tiny_backbone_dir)
    rows = [prompt("red"), prompt(image="missing.png"), prompt("blue"), RawInput("a <|image_pad|>")]
    batches = RowBatches(rows, collator, "row {}".format, keep_going=True)
    plan = BatchPlan(rows, TokenEstimate(collator), 4)
    (batch,) = DataLoader(batches, batch_size=None, sampler=plan, num_workers=num_workers)
    assert sorted(batch.rows) == [0, 2]
    assert batch.bad_rows.keys() == {1, 3}
    assert "missing.png" in batch.bad_rows[1]
    assert "own image token" in batch.bad_rows[3]
    alone = collator.encode_inputs([rows[row] for row in batch.rows])
    assert torch.equal(batch.inputs.tokens["input_ids"], alone.tokens["input_ids"])
    only_bad = BatchPlan(rows, TokenEstimate(collator), 4, rows_per_shard=1, finished=(0, 2, 3))
    (batch,) = (batches[place] for place in only_bad)
    assert (batch.rows, set(batch.bad_rows), len(batch.inputs)) == ((), {1}, 1)
    with pytest.raises(ValueError, match="^row [13]: "):
        RowBatches(rows, collator, "row {}".format)[next(iter(plan))]
