"""MMEB-V2: its table, its published means, and miniatures of every published form, read and scored."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parallel_decoupling.data import download
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.download import download_eval
from parallel_decoupling.data.images import as_picture
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.data.tasks import MMEB_TASKS, V2_TASKS, chosen, find_eval_tasks, read_tasks
from parallel_decoupling.evaluation.report import ScoreReport, write_report
from parallel_decoupling.evaluation.score import TaskResult
from tests.data.test_prompts import write_both
from tests.support.families import save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.mmeb import Hub, table, write_image, write_rows
from tests.support.processes import run_ranks

# VLM2Vec at 6e1e1d4, experiments/public/all_scores/v2.0.0/VLM2Vec-V2.0-Qwen2VL-2B.json, rounded there to four
PUBLISHED = """
K700 .38 SmthSmthV2 .428 HMDB51 .409 UCF101 .6 Breakfast .1478 MVBench .337 Video-MME .307 NExTQA .2092
EgoSchema .34 ActivityNetQA .523 DiDeMo .3038 MSR-VTT .283 MSVD .4806 VATEX .2646 YouCook2 .1063
QVHighlight .494 Charades-STA .2022 MomentSeeker .4083 ViDoRe_arxivqa .8058 ViDoRe_docvqa .4485
ViDoRe_infovqa .8369 ViDoRe_tabfquad .8921 ViDoRe_tatdqa .4382 ViDoRe_shiftproject .6082
ViDoRe_syntheticDocQA_artificial_intelligence .8853 ViDoRe_syntheticDocQA_energy .8651
ViDoRe_syntheticDocQA_government_reports .8501 ViDoRe_syntheticDocQA_healthcare_industry .9217
ViDoRe_esg_reports_human_labeled_v2 .4556 ViDoRe_biomedical_lectures_v2_multilingual .4427
ViDoRe_economics_reports_v2_multilingual .43 ViDoRe_esg_reports_v2_multilingual .4662 VisRAG_ArxivQA .7687
VisRAG_ChartQA .8441 VisRAG_MP-DocVQA .7179 VisRAG_SlideVQA .915 VisRAG_InfoVQA .8565 VisRAG_PlotQA .6605
ViDoSeek-page .2194 ViDoSeek-doc .8018 MMLongBench-page .1189 MMLongBench-doc .4371
"""
ASK = (
    "<|video_1|> Given a video and a question, select the most accurate answer from the provided candidates."
)
LINES = """
K700 Kinetics-700 default/test {"video_id": "a", "pos_text": "archery"}
SmthSmthV2 SmthSmthV2 default/test {"video_id": 7, "pos_text": "b", "neg_text": ["a", "b", "c"]}
HMDB51 HMDB51 default/test {"video_id": "a", "pos_text": "clap"}
UCF101 UCF101 default/test {"video_id": "a", "pos_text": "Archery"}
Breakfast Breakfast default/test {"video_id": "a", "pos_text": "tea"}
MVBench MVBench action_count/train {"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "y"}
Video-MME Video-MME default/test {"videoID": "a", "question": "q", "options": ["A. x.", "B. y."], \
"answer": "B"}
NExTQA NExTQA MC/test {"video": 7, "question": "q", "a0": "x", "a1": "y", "a2": "z", "a3": "v", \
"a4": "w", "answer": 2}
EgoSchema EgoSchema Subset/test {"video_idx": "a", "question": "q", "option": ["A. x.", "B. y."], \
"answer": "1"}
ActivityNetQA ActivityNetQA default/test {"video_name": "a", "question": "is it", "answer": "no"}
DiDeMo DiDeMo default/test {"video": "x/a.mp4", "caption": "see a"} {"video": "b.mp4", "caption": "see b"}
MSR-VTT MSR-VTT test_1k/test {"video_id": "a", "caption": "see a"} {"video_id": "b", "caption": "see b"}
MSVD MSVD default/test {"video_id": "a", "caption": ["see a", "or"]} {"video_id": "b", "caption": ["see b"]}
VATEX VATEX default/test {"videoID": "a", "enCap": ["see a", "or"]} {"videoID": "b", "enCap": ["see b"]}
YouCook2 lmms-lab/YouCook2 default/val {"id": "a", "sentence": "see a"} {"id": "b", "sentence": "see b"}
QVHighlight QVHighlight default/test {"query": "q", "video_path": "videos/m.mp4"}
Charades-STA Charades-STA default/test {"query": "q", "video_path": "m.mp4"}
MomentSeeker MomentSeeker default/test {"query": "q", "input_frames": "x/a.mp4", "negative_frames": \
[{"output_path": "x/d.mp4"}], "positive_frames": [{"output_path": "x/b.mp4"}, {"output_path": "x/c.mp4"}]}
"""
FRAMES = {
    "video_cls": "K700/a SSv2/7 HMDB51/a UCF101/a Breakfast/a",
    "video_qa": "MVBench/action_count/a Video-MME/a NExTQA/7 EgoSchema/a ActivityNetQA/v_a",
    "video_ret": " ".join(
        f"{name}/a {name}/b" for name in ("DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2")
    ),
    "video_mret": " ".join(
        [
            f"{name}/m/{clip}"
            for name in ("QVHighlight", "Charades_STA")
            for clip in ("query", "positive_1", "neg")
        ]
        + [f"MomentSeeker/video_frames/x_{name}" for name in "abcd"]
    ),
}
VIDEO = {line.split(" ")[0]: line.split(" ", 3)[1:] for line in LINES.strip().splitlines()}


def picture(colour: Any) -> dict[str, Any]:
    """A picture as ``datasets`` writes it."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": "a.png"}


def published(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of all repositories of MMEB-V2 as the hub has them, with frames in archives."""
    files: dict[str, dict[str, bytes]] = {"TIGER-Lab/MMEB-V2": {}}
    for repo, place, rows in VIDEO.values():
        listed = json.loads(f"[{rows.replace('} {', '}, {')}]")
        owner = "" if "/" in repo else "VLM2Vec/"
        files[f"{owner}{repo}@refs/convert/parquet"] = {f"{place}/0000.parquet": table(listed)}
    for kind, videos in FRAMES.items():
        for place, video in enumerate(videos.split()):
            for number in range(3):
                colour = (20 * place, 90 * number, 99)
                write_image(folder / kind / video / f"frame_{number}.jpg", colour)
        tape = io.BytesIO()
        with tarfile.open(fileobj=tape, mode="w:gz") as archive:
            archive.add(folder / kind, kind if kind in ("video_mret", "video_qa") else ".")
        content, ends = tape.getvalue(), [f"-0{part}" for part in range(5)] if kind == "video_qa" else [""]
        step = -(-len(content) // len(ends))
        parts = {end: content[step * part : step * (part + 1)] for part, end in enumerate(ends)}
        names = {f"video-tasks/frames/{kind}.tar.gz{end}": part for end, part in parts.items()}
        files["TIGER-Lab/MMEB-V2"] |= names
    for task in read_tasks(folder).values():
        if task.group == "visdoc" and task.source and task.source.published:
            split = "train" if task.name.startswith("VisRAG") else "test"
            rows: dict[str, list[dict[str, Any]]] = {
                "corpus": [{"corpus-id": n, "image": picture((80 * n, 9, 9))} for n in range(3)],
                "queries": [{"query-id": 0, "query": "q"}],
                "qrels": [{"query-id": 0, "corpus-id": n, "score": n} for n in range(3)],
            }
            names = {f"{part}/{split}-00000-of-00001.parquet": table(each) for part, each in rows.items()}
            files[task.source.published["set"]] = names
    return files


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 78 tasks: MMEB's golden rows, and MMEB-V2 as it comes from the hub."""
    root = tmp_path_factory.mktemp("all")
    for name in MMEB_TASKS:
        write_both(root, name)
    hub = Hub(published(root / "frames"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "snapshot_download", hub)
        groups = ["overall", "video", "visdoc"]
        MMEBDataModule(str(root / "v1"), eval_tasks=groups, download=True).prepare_data()
        download_eval(root / "v1", [*MMEB_TASKS, *V2_TASKS])
    conversions = [repo for repo, _ in hub.asked if "@" in repo]
    assert len(hub.asked) == len({repo for repo, _ in hub.asked} - {"TIGER-Lab/MMEB-V2"}) + 4, "once each"
    assert len(conversions) == 18
    assert {"vidore/arxivqa_test_subsampled_beir", "openbmb/VisRAG-Ret-Test-ChartQA"} <= dict(
        hub.asked
    ).keys()
    assert dict(hub.asked)["VLM2Vec/MSR-VTT@refs/convert/parquet"] == ["test_1k/test/*.parquet"]
    return root / "v1"


def test_the_table_has_all_78_tasks_with_the_published_names_and_means(tmp_path: Path) -> None:
    assert len(read_tasks(tmp_path)) == len(MMEB_TASKS) + len(V2_TASKS) == 78
    names, scores = PUBLISHED.split()[::2], PUBLISHED.split()[1::2]
    assert sorted(names) == sorted(V2_TASKS)
    results = {}
    for name, score in zip(names, map(float, scores), strict=True):
        task, ndcg = V2_TASKS[name], {"path_0": {"ndcg@5": score}}
        hits, metrics = ({"path_0": 0.0}, ndcg) if task.group == "visdoc" else ({"path_0": score}, {})
        results[name] = TaskResult(task, 10, 0.1, hits, metrics=metrics)
    means = {name: mean["path_0"] for name, mean in ScoreReport(results).means.items()}
    assert means["video"] == pytest.approx(0.3457752807034119, abs=5e-5)
    assert means["visdoc"] == pytest.approx(0.6535975211261046, abs=5e-5)
    assert means["mmeb_v2"] == pytest.approx((18 * means["video"] + 24 * means["visdoc"]) / 42)
    assert ScoreReport(results).partial_means == {"mmeb_v2": 42}
    write_report(ScoreReport({"K700": results["K700"]}), tmp_path)
    written = json.loads((tmp_path / "leaderboard.json").read_text())["metrics"]
    assert (list(written), written["video"]["K700"]["hit@1"]) == (["image", "video", "visdoc"], 0.38)


def test_every_form_is_read_as_vlm2vec_reads_it(data_dir: Path) -> None:
    found = find_eval_tasks(data_dir)
    assert chosen(None, found, data_dir) == list(MMEB_TASKS)
    assert chosen(["video"], found, data_dir) == list(VIDEO)
    read = {name: read_eval_task(data_dir, name) for name in V2_TASKS}
    asked = {name: task.queries[0].text.removeprefix(ASK) for name, task in read.items()}
    rest = " Return only the exact text of your chosen answer. Question:  "
    assert asked["MVBench"] == asked["NExTQA"].split("\n(C)")[0] == f"{rest}q\nOptions:\n(A) x\n(B) y"
    assert asked["Video-MME"] == f"{rest}q\nA. x.\nB. y."
    assert asked["EgoSchema"] == f"{rest}qA. x. B. y."
    assert asked["ActivityNetQA"] == f"{rest}is it? (A) yes; (B) no."
    assert asked["K700"] == "<|video_1|> Recognize the category of the video content."
    assert asked["MSVD"] == "Find the video snippet that corresponds to the given summary: see a"
    assert asked["MomentSeeker"].endswith("given sentence and video segment: q")
    answers = {n: [t.candidates[c].text for c in t.candidates_of_row[0]] for n, t in read.items()}
    right = {"MVBench": "(B) y", "Video-MME": "y", "NExTQA": "z", "EgoSchema": "y", "ActivityNetQA": "no"}
    right |= {"K700": "archery", "SmthSmthV2": "b", "HMDB51": "clap", "UCF101": "Archery", "Breakfast": "tea"}
    assert {name: answers[name][0] for name in right} == right
    labels = {"K700": 700, "HMDB51": 51, "UCF101": 101, "Breakfast": 10}
    assert {name: len(answers[name]) for name in labels} == labels
    assert answers["SmthSmthV2"] == ["b", "a", "c"]
    see = "<|video_1|> Understand the content of the provided video."
    for name in ("DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2"):
        assert (answers[name], read[name].queries[1].text[-5:]) == ([see, see], "see b")
        shown = [Path(str(read[name].candidates[row].video[0])).parent.name for row in range(2)]
        assert (shown, read[name].candidates_of_row) == (["a", "b"], [[0, 1], [1, 0]])
    for name in ("QVHighlight", "Charades-STA"):
        clips = [Path(str(clip.video[0])).parent.name for clip in read[name].candidates]
        assert clips == ["positive_1", "neg"]
    assert read["MomentSeeker"].relevance_of_row == [{0: 1.0, 1: 1.0}]
    assert read["MomentSeeker"].candidates_of_row == [[0, 1, 2]]
    for name in (name for name, task in V2_TASKS.items() if task.group == "visdoc"):
        assert asked[name] == "Find a document image that matches the given query: q"
        assert read[name].relevance_of_row == [{1: 1.0, 2: 2.0}]
        assert [Image.open(each.images[0]).size for each in read[name].candidates] == [(16, 16)] * 3
        assert answers[name][0] == "<|image_1|> Understand the content of the provided document image."


def test_the_first_thousand_rows_of_smthsmthv2_count_in_a_clone_of_the_main_branch(tmp_path: Path) -> None:
    file = tmp_path / "video-tasks/SmthSmthV2/data/test.jsonl"
    file.parent.mkdir(parents=True)
    rows = ({"video_id": number, "pos_text": "b", "neg_text": ["a", "b"]} for number in range(1002))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_eval_task(tmp_path, "SmthSmthV2", must_exist=False)
    assert read.query_of_row == [*range(1000)]


def test_rows_of_datasets_with_pictures_train_and_are_embedded(tmp_path: Path) -> None:
    row = {"q": "x", "image": picture("red"), "a": [picture("red"), picture("blue")]}
    write_rows(tmp_path / "a.parquet", [{**row, "raw": picture("red")["bytes"]}])
    columns = {"query_text": "q", "query_image": "raw", "candidate_image": "a", "negative_image": "image"}
    entry = {"meta_task": "custom", "in_distribution": True, "train_file": "a.parquet", "columns": columns}
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": entry}))
    pair = TrainSubset(tmp_path, "Mine", positives=2, hard_negatives=1)[0]
    files = [pair.query.images[0], pair.candidate.images[0], pair.negatives[0].images[0]]  # type: ignore[union-attr]
    assert len({Path(str(file)).stem for file in files}) == 1, "the same picture"
    assert Image.open(pair.positives[0].images[0]).getpixel((0, 0)) == (0, 0, 255)  # type: ignore[union-attr]
    source = RowSource(tmp_path / "a.parquet")
    assert Path(str(source[0].images[0])).is_file()
    assert str(tmp_path.parent) not in str(source.columns([0])["image"])
    assert as_picture(picture("red")).size == (16, 16)  # type: ignore[union-attr]


def evaluate(backbone: str, data_dir: Path, folder: Path, devices: int) -> None:
    trainer = make_trainer(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
    data = small_data(str(data_dir), eval_tasks=["overall", "video", "visdoc"])
    trainer.test(small_embedder(backbone), data)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("qwen2_vl", 2), ("qwen3_vl", 1)])
def test_all_78_tasks_are_scored_by_one_or_two_processes_alike(
    name: str, processes: int, data_dir: Path, tmp_path: Path
) -> None:
    backbone = save_tiny_family(name, tmp_path / "backbone")
    evaluate(backbone, data_dir, tmp_path / "one", 1)
    one = json.loads((tmp_path / "one/scores.json").read_text())
    assert set(one["tasks"]) == {*MMEB_TASKS, *V2_TASKS}
    assert one["means"].keys() >= {"overall", "video", "visdoc", "mmeb_v2"}
    if processes == 2:
        run_ranks(lambda: evaluate(backbone, data_dir, tmp_path / "two", 2))
        two = json.loads((tmp_path / "two/scores.json").read_text())
        assert (one["tasks"], one["means"]) == (two["tasks"], two["means"])
