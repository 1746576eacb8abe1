"""Videos through the processor's own video input equal the stock model, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from parallel_decoupling.batch import RawInput, TokenLimit
from parallel_decoupling.data.collate import Collator, identity
from parallel_decoupling.data.images import ImagePolicy, as_video
from parallel_decoupling.data.prompts import to_raw_input
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder, build_encoder
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image


def frames(count: int, size: tuple[int, int] = (48, 32), seed: int = 0) -> list[Image.Image]:
    return [noise_image(*size, seed * 100 + number) for number in range(count)]


ROWS: list[Any] = [
    {"video": frames(4), "text": "count the objects"},
    "read the word",
    {"image": noise_image(32, 48, 7), "text": "the picture"},
    {"video": frames(3, (32, 32), 1)},
    {"images": [noise_image(32, 32, 8)], "video": frames(2, (32, 48), 2), "text": "a red circle"},
]
VIDEO_MODELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module", params=VIDEO_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_family(request.param, tmp_path_factory.mktemp(request.param))


def encoder_of(folder: str, **options: Any) -> ParallelEncoder:
    return ParallelEncoder(load_backbone(folder, adapter=AdapterConfig(kind="frozen")), **options).eval()


def stock_alone(folder: str, row: RawInput) -> Tensor:
    """The slow version: the stock processor and model on one row, whose positions the model finds itself."""
    processor, stock = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    text = row.text.replace("<|image_1|>", "<|image_pad|>").replace("<|video_1|>", "<|video_pad|>")
    given: dict[str, Any] = {"images": [list(row.images)]} if row.images else {}
    if row.video:
        numbers = list(range(len(row.video)))
        about = {"total_num_frames": len(numbers), "fps": 2.0, "frames_indices": numbers}
        given |= {"videos": [list(row.video)], "video_metadata": [about], "do_sample_frames": False}
    data = processor(text=[text], return_tensors="pt", **given)
    with torch.no_grad():
        return F.normalize(stock(**data).last_hidden_state[0, -1], dim=-1)


def test_rows_of_a_mixed_batch_equal_the_stock_model(folder: str) -> None:
    embedder = Embedder(encoder_of(folder, num_paths=1, prefix_length=0))
    together = embedder.encode(ROWS)
    for row, embedding in zip(map(to_raw_input, ROWS), together, strict=True):
        torch.testing.assert_close(embedding, stock_alone(folder, row), rtol=1e-5, atol=1e-5)
    paths = encoder_of(folder, num_paths=3, prefix_length=4)
    collator = Embedder(paths).collator
    inputs = collator.encode_inputs([to_raw_input(row) for row in ROWS])
    with torch.no_grad():
        several = paths(inputs)
        assert not torch.allclose(several[:, 0], several[:, 1], atol=1e-2)
        torch.testing.assert_close(several[:, 1:2], paths(inputs, [1]), rtol=1e-5, atol=1e-5)
        alone = paths(inputs.select([3]))
        torch.testing.assert_close(several[3:4], alone, rtol=1e-5, atol=1e-5)
    one_by_one = [collator._process_alone(to_raw_input(row)) for row in ROWS]
    joined = collator._join(one_by_one)
    assert torch.equal(joined.tokens["input_ids"], inputs.tokens["input_ids"])
    for row, other in zip(inputs.vision, joined.vision, strict=True):
        assert row.keys() == other.keys()
        assert all(torch.equal(row[key], other[key]) for key in row)


def test_order_and_number_of_frames_count(folder: str) -> None:
    embedder, video = Embedder(encoder_of(folder, num_paths=1, prefix_length=0)), frames(4)
    ours, reverse = embedder.encode({"video": video}), embedder.encode({"video": video[::-1]})
    assert not torch.allclose(ours, reverse, atol=1e-3)
    long = frames(64)
    policy = ImagePolicy()
    chosen = [long[number] for number in range(0, 64, 9)]  # numpy.linspace(0, 63, 8, dtype=int)
    assert policy.chosen(long) == chosen
    torch.testing.assert_close(embedder.encode({"video": long}), embedder.encode({"video": chosen}))
    torch.testing.assert_close(
        embedder.encode({"video": video[:1]}), embedder.encode({"video": video[:1] * 2})
    )
    collator = embedder.collator
    row = to_raw_input({"video": long, "text": "count"})
    real = int(collator.encode_inputs([row]).lengths[0])
    assert real <= TokenEstimate(collator, bytes_per_token=1)(row) <= real + 8 * 8 + len(row.text)
    small = Collator(
        embedder.encoder.processor,
        image_token=embedder.encoder.image_token,
        images=ImagePolicy(max_frames=2, max_video_pixels=2 * 16 * 16),
    )
    with_budget = small.encode_inputs([to_raw_input({"video": frames(4, (64, 64))})])
    (grid,) = with_budget.vision[0]["video_grid_thw"].tolist()
    whole = collator.encode_inputs([to_raw_input({"video": frames(4, (64, 64))})]).vision[0]["video_grid_thw"]
    assert grid[0] == 1
    assert grid[1] < whole[0][1]


def test_a_long_text_is_cut_behind_the_video(folder: str) -> None:
    encoder = encoder_of(folder, num_paths=1, prefix_length=0)
    whole = Embedder(encoder).collator.encode_inputs(
        [to_raw_input({"video": frames(2), "text": "x y z " * 9})]
    )
    limit = TokenLimit(int(whole.lengths[0]) - 5)
    cut = Collator(encoder.processor, image_token=encoder.image_token, limit=limit)
    inputs = cut.encode_inputs([to_raw_input({"video": frames(2), "text": "x y z " * 9})])
    assert int(inputs.lengths[0]) == limit.max_tokens
    assert encoder(inputs).shape[0] == 1


def test_what_is_no_video_and_who_takes_none(tmp_path: Path, tiny_clip_dir: str) -> None:
    video = {"video": frames(2), "text": "count the objects"}
    names = {
        name: save_tiny_family(name, tmp_path / name) for name in ("qwen2", "smolvlm", "llava_onevision")
    }
    encoders: list[Any] = [encoder_of(name, num_paths=1, prefix_length=0) for name in names.values()]
    encoders.append(build_encoder(tiny_clip_dir, {}, {}))
    for encoder in encoders:
        with pytest.raises(ValueError, match=r"input 0: the backbone takes no video; Qwen2-VL, Qwen2\.5-VL"):
            Embedder(encoder).encode([video])
    for wrong, message in (
        ([], "a list is not a video: use a list of its frames"),
        (noise_image(8, 8), "is not a video"),
        ("x", "a str is not a video"),
        ([3], "a int cannot be embedded"),
    ):
        with pytest.raises(ValueError, match=message):
            to_raw_input({"video": wrong})
    with pytest.raises(ValueError, match="no frames in the folder"):
        as_video(tmp_path)


def test_frames_of_a_folder_come_by_number(tmp_path: Path) -> None:
    for name in ("frame_10.jpg", "frame_2.JPG", "frame_1.png", "notes.txt"):
        noise_image(16, 16).save(tmp_path / name, "PNG")
    row = to_raw_input({"video": str(tmp_path)})
    assert [Path(str(frame)).name for frame in row.video] == ["frame_1.png", "frame_2.JPG", "frame_10.jpg"]
    assert row.text == "<|video_1|>\n"
    other = RawInput(row.text, video=row.video[:2])
    assert identity(row) != identity(other)
