"""Videos through the processor's own video input equal the stock model, row by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

from parallel_decoupling.batch import RawInput, TokenLimit
from parallel_decoupling.data.collate import Collator, identity
from parallel_decoupling.data.images import ImagePolicy, as_video
from parallel_decoupling.data.prompts import to_raw_input
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate
from parallel_decoupling.model.backbone import load_backbone
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
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_family(request.param, tmp_path_factory.mktemp(request.param))


def embedder_of(folder: str, num_paths: int = 1, prefix_length: int = 0) -> Embedder:
    encoder = ParallelEncoder(load_backbone(folder), num_paths=num_paths, prefix_length=prefix_length)
    return Embedder(encoder.eval())


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_the_stock_model(folder: str) -> None:
    rows = [to_raw_input(row) for row in ROWS]
    processor, stock = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for row, embedding in zip(rows, embedder_of(folder).encode(rows), strict=True):
        text = row.text.replace("<|image_1|>", "<|image_pad|>").replace("<|video_1|>", "<|video_pad|>")
        given: dict[str, Any] = {"images": [list(row.images)]} if row.images else {}
        if row.video:
            numbers = list(range(len(row.video)))
            about = {"total_num_frames": len(numbers), "fps": 2.0, "frames_indices": numbers}
            given |= {"videos": [list(row.video)], "video_metadata": [about], "do_sample_frames": False}
        states = stock(**processor(text=[text], return_tensors="pt", **given)).last_hidden_state
        torch.testing.assert_close(embedding, F.normalize(states[0, -1], dim=-1), **CLOSE)
    paths = embedder_of(folder, 3, 4)
    inputs = paths.collator.encode_inputs(rows)
    together = paths.encoder(inputs)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-2)
    torch.testing.assert_close(together[:, 1:2], paths.encoder(inputs, [1]), **CLOSE)
    torch.testing.assert_close(together[3:4], paths.encoder(inputs.select([3])), **CLOSE)
    collator = paths.collator
    alone = collator._join([collator._process([row]) for row in rows])
    torch.testing.assert_close(paths.encoder(alone), together, **CLOSE)


def test_order_number_and_size_of_frames_count(folder: str) -> None:
    embedder, video, long = embedder_of(folder), frames(4), frames(64)
    ours, reverse = embedder.encode([{"video": video}, {"video": video[::-1]}])
    assert not torch.allclose(ours, reverse, atol=1e-3)
    assert ImagePolicy().chosen(long) == long[::9], "numpy.linspace(0, 63, 8, dtype=int)"
    assert torch.equal(embedder.encode({"video": long}), embedder.encode({"video": long[::9]}))
    assert torch.equal(embedder.encode({"video": video[:1]}), embedder.encode({"video": video[:1] * 2}))
    collator, row = embedder.collator, to_raw_input({"video": long, "text": "count the objects " * 2})
    real = int(collator.encode_inputs([row]).lengths[0])
    assert real <= TokenEstimate(collator, bytes_per_token=1)(row) <= real + 8 * 8 + len(row.text)
    options: dict[str, Any] = {"image_token": embedder.encoder.image_token}
    policy = ImagePolicy(max_frames=2, max_video_pixels=2 * 16 * 16)
    small = Collator(collator.processor, images=policy, **options)
    square = to_raw_input({"video": frames(4, (64, 64))})
    grids = [each.encode_inputs([square]).vision[0]["video_grid_thw"][0] for each in (small, collator)]
    assert (grids[0][0], grids[0][1] < grids[1][1]) == (1, True)
    cut = Collator(collator.processor, limit=TokenLimit(real - 5), **options).encode_inputs([row])
    assert (int(cut.lengths[0]), cut.num_cut) == (real - 5, 1), "a text is cut behind the video"


def test_what_is_a_video_and_who_takes_none(tmp_path: Path, tiny_clip_dir: str) -> None:
    families = ("qwen2", "smolvlm", "llava_onevision")
    embedders = [embedder_of(save_tiny_family(name, tmp_path / name)) for name in families]
    for embedder in (*embedders, Embedder(build_encoder(tiny_clip_dir, {}))):
        with pytest.raises(ValueError, match=r"input 0: the backbone takes no video; Qwen2-VL, Qwen2\.5-VL"):
            embedder.encode([ROWS[0]])
    for wrong, message in (([], "a list is not a video: use a list"), ("x", "a str is not"), ([3], "a int")):
        with pytest.raises(ValueError, match=message):
            to_raw_input({"video": wrong})
    with pytest.raises(ValueError, match="no frames in the folder"):
        as_video(tmp_path)
    for name in ("frame_10.jpg", "frame_2.JPG", "frame_1.png", "notes.txt"):
        noise_image(16, 16).save(tmp_path / name, "PNG")
    row = to_raw_input({"video": str(tmp_path)})
    assert [Path(str(frame)).name for frame in row.video] == ["frame_1.png", "frame_2.JPG", "frame_10.jpg"]
    assert identity(row) != identity(RawInput(row.text, (), 0, row.video[:2]))
