from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode, similarity, to_raw_inputs
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.tiny import save_tiny_backbone

TEXTS = ["a", "a much longer text than the others", "bb", "", "middle length", "bb"]


class HashCollator:
    """Tokens are the bytes of the text, padded on the right; counts its calls."""

    def __init__(self) -> None:
        self.seen: list[list[RawInput]] = []

    def encode_inputs(self, inputs: list[RawInput], places: list[str]) -> EncoderInputs:
        assert len(places) == len(inputs)
        self.seen.append(list(inputs))
        length = max(len(row.text) for row in inputs)
        rows = [list(row.text.encode()) for row in inputs]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        vision = tuple({"pixels": torch.zeros(1)} if row.images else {} for row in inputs)
        return EncoderInputs({"input_ids": ids, "attention_mask": (ids > 0).long()}, vision)


class HashEncoder(nn.Module):
    """Every text has one random unit vector per path, whatever the batch and the padding."""

    num_paths, embed_dim, aggregate_dim = 3, 5, 15

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
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


def raw(texts: list[str]) -> list[RawInput]:
    return [RawInput(text) for text in texts]


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    file = tmp_path / "picture.PNG"
    Image.new("RGB", (30, 20), "red").save(file)
    return str(file)


# ---- encode


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_rows_come_back_in_order_whatever_the_batch_size(batch_size: int) -> None:
    encoder, texts = HashEncoder(), [text for text in TEXTS if text]
    one_by_one = torch.stack([encode(encoder, HashCollator(), raw([text]))[0] for text in texts])
    together = encode(encoder, HashCollator(), raw(texts), batch_size=batch_size)
    assert torch.equal(together, one_by_one)
    assert together.dtype == torch.float32
    assert not together.requires_grad


def test_batches_are_sorted_by_length_longest_first() -> None:
    collator = HashCollator()
    encode(HashEncoder(), collator, raw(["a", "aaaa", "aa", "aaa", "aaaaa"]), batch_size=2)
    assert [[len(row.text) for row in batch] for batch in collator.seen] == [[5, 4], [3, 2], [1]]


def test_selected_paths_are_the_columns_of_all() -> None:
    encoder, inputs = HashEncoder(), raw(["one", "two", "three"])
    every = encode(encoder, HashCollator(), inputs)
    assert every.shape == (3, 3, 5)
    assert torch.equal(encode(encoder, HashCollator(), inputs, paths=[2, 0]), every[:, [2, 0]])
    assert torch.equal(encode(encoder, HashCollator(), inputs, paths=1), every[:, 1])
    aggregate = encode(encoder, HashCollator(), inputs, paths="aggregate")
    torch.testing.assert_close(aggregate, F.normalize(every.flatten(1), dim=-1))


def test_no_inputs_give_an_empty_tensor_of_the_right_shape() -> None:
    shapes = {
        paths: encode(HashEncoder(), HashCollator(), [], paths=paths).shape
        for paths in ("all", "aggregate", 1, (0, 2))
    }
    assert shapes == {"all": (0, 3, 5), "aggregate": (0, 15), 1: (0, 5), (0, 2): (0, 2, 5)}


def test_encoding_is_in_eval_mode_and_restores_the_mode_of_every_module() -> None:
    encoder = HashEncoder().train()
    encoder.frozen.eval()
    encode(encoder, HashCollator(), raw(["text"]))
    assert encoder.modes == [False]
    assert encoder.training
    assert not encoder.frozen.training


def test_mode_is_restored_after_an_error() -> None:
    encoder = HashEncoder().train()
    encoder.forward = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        encode(encoder, HashCollator(), raw(["text"]))
    assert encoder.training


def test_result_can_be_used_in_training() -> None:
    embeddings = encode(HashEncoder(), HashCollator(), raw(["text"]))
    weight = torch.ones(5, requires_grad=True)
    (embeddings * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (3, "no path 3; the encoder has paths 0 to 2"),
        (-1, "no path -1"),
        (True, "no path True"),
        ([0.5], r"no path 0\.5"),
        ([0.0], r"no path 0\.0"),
        ([0, True], "no path True"),
        (1.0, r"no path 1\.0"),
        (["0"], "no path '0'"),
        ([], "paths is empty"),
        ("mean", "'mean'; use 'all', 'aggregate'"),
    ],
)
def test_wrong_path_is_an_error(paths: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(HashEncoder(), HashCollator(), [], paths=paths)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_path_numbers() -> None:
    encoder, inputs = HashEncoder(), raw(["one", "two"])
    every = encode(encoder, HashCollator(), inputs)
    assert torch.equal(encode(encoder, HashCollator(), inputs, paths=np.int64(1)), every[:, 1])
    assert torch.equal(encode(encoder, HashCollator(), inputs, paths=np.arange(2)), every[:, :2])  # type: ignore[arg-type]


@pytest.mark.parametrize("concatenated", [True, False])
def test_truncated_embeddings_are_first_coordinates_and_their_aggregate(concatenated: bool) -> None:
    encoder, inputs = HashEncoder(), raw(["one", "two", "three"])
    if not concatenated:
        encoder.aggregate_dim = 5  # type: ignore[misc]
        encoder.aggregate = lambda paths: F.normalize(paths.mean(1), dim=-1)  # type: ignore[method-assign]
    every = encode(encoder, HashCollator(), inputs)
    short = torch.zeros(3, 3, 2)
    for row in range(3):
        for path in range(3):
            short[row, path] = every[row, path, :2] / every[row, path, :2].norm()
    options = {"truncate_dim": 2}
    torch.testing.assert_close(encode(encoder, HashCollator(), inputs, **options), short)
    torch.testing.assert_close(encode(encoder, HashCollator(), inputs, paths=1, **options), short[:, 1])
    torch.testing.assert_close(encode(encoder, HashCollator(), inputs, paths=[2], **options), short[:, [2]])
    aggregate = encode(encoder, HashCollator(), inputs, paths="aggregate", **options)
    assert aggregate.shape == (3, 6 if concatenated else 2)
    torch.testing.assert_close(aggregate, encoder.aggregate(short))
    for paths in ("all", "aggregate", 1):
        whole = encode(encoder, HashCollator(), inputs, paths=paths)
        assert torch.equal(encode(encoder, HashCollator(), inputs, paths=paths, truncate_dim=5), whole)


@pytest.mark.parametrize("dim", [0, 6, -1, 2.0, True])
def test_a_dimension_that_does_not_exist_is_an_error(dim: Any) -> None:
    with pytest.raises(ValueError, match="embeddings have 5 dimensions"):
        encode(HashEncoder(), HashCollator(), raw(["a"]), truncate_dim=dim)


@pytest.mark.parametrize("prefix_type", ["deep", "shallow"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_encode_outside_autocast(
    tiny_backbone_dir: str, image_file: str, dtype: Any, prefix_type: Any
) -> None:
    inputs = ["a red circle", {"text": "what colour is it?", "image": image_file}]
    results = []
    for kind in (dtype, "float32"):
        backbone = load_backbone(tiny_backbone_dir, dtype=kind, adapter=AdapterConfig(kind="dora"))
        encoder = ParallelEncoder(backbone, num_paths=2, prefix_type=prefix_type, aggregation="learned")
        with torch.no_grad():  # an adapter that adds nothing would hide a wrong dtype
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 3 * 0.01)
        embedder = Embedder(encoder)
        results.append((embedder.encode(inputs), embedder.encode(inputs, paths="aggregate")))
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(half.shape[:-1]))
        assert F.cosine_similarity(half, full, dim=-1).min() > 0.98


def test_wrong_batch_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        encode(HashEncoder(), HashCollator(), [], batch_size=0)


def test_progress_is_shown_only_on_request_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = raw(["a"] * 10)
    encode(HashEncoder(), HashCollator(), inputs, batch_size=1)
    assert capsys.readouterr().err == ""
    encode(HashEncoder(), HashCollator(), inputs, batch_size=1, show_progress=True)
    assert "encode" in capsys.readouterr().err


def test_real_encoder_gives_the_same_embeddings_at_any_batch_size(tmp_path: Path, image_file: str) -> None:
    torch.manual_seed(0)
    encoder = ParallelEncoder(load_backbone(str(save_tiny_backbone(tmp_path / "tiny"))), num_paths=2)
    collator = Collator(encoder.processor, image_token=encoder.image_token)
    image = Image.new("RGB", (48, 64), "blue")
    inputs = ["a red circle", image, {"text": "what colour is it?", "image": image_file}, "count the objects"]
    single = encode(encoder, collator, inputs, batch_size=1)
    torch.testing.assert_close(encode(encoder, collator, inputs, batch_size=4), single, atol=1e-5, rtol=0)
    torch.testing.assert_close(encode(encoder, collator, inputs, paths=1), single[:, 1], atol=1e-5, rtol=0)
    aggregate = encode(encoder, collator, inputs, paths="aggregate")
    torch.testing.assert_close(aggregate, encoder.aggregate(single), atol=1e-5, rtol=0)
    torch.testing.assert_close(single.norm(dim=-1), torch.ones(4, 2))
    assert (similarity(single, single) - torch.eye(4)).tril(-1).max() < 0.9999, "rows must differ"


# ---- inputs


def test_every_kind_of_input_becomes_its_prompt(image_file: str) -> None:
    image = Image.new("RGB", (8, 8))
    rows = to_raw_inputs(
        [
            "a text",
            image,
            image_file,
            Path(image_file),
            {"text": "what?", "image": image},
            {"text": "which?", "images": [image, image_file], "instruction": "My own:"},
            {"text": "no picture", "image": None},
        ],
        instruction="Find it:",
    )
    assert rows == [
        prompt("a text", instruction="Find it:"),
        prompt(image=image, instruction="Find it:"),
        prompt(image=image_file, instruction="Find it:"),
        prompt(image=image_file, instruction="Find it:"),
        prompt("what?", image=image, instruction="Find it:"),
        prompt("which?", images=[image, image_file], instruction="My own:"),
        prompt("no picture", instruction="Find it:"),
    ]
    assert rows[4].text == f"{IMAGE_PLACEHOLDER}\nFind it: what?\n"


def test_finished_prompts_pass_unchanged() -> None:
    assert to_raw_inputs([RawInput(" as it is \n")]) == [RawInput(" as it is \n")]
    with pytest.raises(ValueError, match="input 0 is a RawInput"):
        to_raw_inputs([RawInput("x")], instruction="more")


def test_text_that_only_ends_like_an_image_is_a_text_in_a_dictionary() -> None:
    assert to_raw_inputs([{"text": "logo.png"}]) == [RawInput("logo.png")]
    assert to_raw_inputs([{"text": "see images/logo.png"}]) == [RawInput("see images/logo.png")]
    assert to_raw_inputs(["one/two of a text"]) == [RawInput("one/two of a text")]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("images/missing.jpg", "no image file 'images/missing.jpg'; if this is a text"),
        ("cat.PNG", "no image file 'cat.PNG'; if this is a text, pass {'text': 'cat.PNG'}"),
        (Path("missing.jpg"), "no image file 'missing.jpg'"),
        ({"image": "missing.jpg"}, "no image file 'missing.jpg'"),
        ({"txt": "typo"}, r"unknown keys \['txt'\]"),
        ({"text": " "}, "neither text nor image"),
        ({"instruction": "alone"}, "neither text nor image"),
        ({"text": 3}, "a int as 'text'"),
        ({"image": b"bytes"}, "a bytes as image"),
        ({"image": "a.png", "images": ["a.png"]}, "both 'image' and 'images'"),
        ({"images": "a.png"}, "a single str as 'images'"),
        ("  ", "an empty text"),
        (None, "is a NoneType; use a text"),
        (torch.zeros(3), "is a Tensor; use a text"),
    ],
)
def test_bad_input_is_an_error_that_names_its_index(item: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"input 1.*{message}"):
        to_raw_inputs(["fine", item])


def test_an_instruction_that_is_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="instruction is a int; use a string"):
        to_raw_inputs(["a"], instruction=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "single", ["text", Path("a.png"), Image.new("RGB", (4, 4)), {"text": "a"}, RawInput("a")]
)
def test_a_single_input_is_an_error_that_says_to_pass_a_list(single: object) -> None:
    with pytest.raises(ValueError, match="pass a list"):
        to_raw_inputs(single)  # type: ignore[arg-type]


# ---- similarity


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_similarity_equals_loops(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(4, *shape), torch.randn(5, *shape)
    result = similarity(a, b)
    for i in range(4):
        for j in range(5):
            cosine = F.cosine_similarity(a[i], b[j], dim=-1).mean()
            torch.testing.assert_close(result[i, j], cosine)


def test_similarity_is_computed_in_float32() -> None:
    a = torch.randn(4, 64).half()
    assert similarity(a, a).dtype == torch.float32
    torch.testing.assert_close(similarity(a, a).diagonal(), torch.ones(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 4), (2, 3, 4)), ((2, 4), (2, 5)), ((2, 3, 4), (2, 2, 4)), ((4,), (4,))]
)
def test_similarity_of_different_shapes_is_an_error(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass \[A, D\] and \[B, D\]"):
        similarity(torch.ones(a), torch.ones(b))


def test_errors_of_the_collator_name_the_index_of_the_input(tmp_path: Path, image_file: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(image_file).read_bytes()[:40])
    collator = Collator(None, image_token="<image>")
    for second, message in (
        (RawInput(f"{IMAGE_PLACEHOLDER}\nalone"), "0 images but 1"),
        (str(broken), "Cannot read image"),
    ):
        with pytest.raises(ValueError, match=f"^input 1: {message}"):
            encode(HashEncoder(), collator, ["a longer first text", second])
