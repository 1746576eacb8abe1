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
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.files import write_json
from studies.published.audit import audit_scores, read_scores
from tests.data.test_prompts import write_both
from tests.support.families import save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.mmeb import Hub, table, write_image, write_rows
from tests.support.processes import run_ranks

# VLM2Vec at 8978225, docs/mmebv2_reproduction/results_qwen3vl8b.csv, column pr_branch_main_plus_fixes
PUBLISHED = """
A-OKVQA 72.6 CIRR 74.7 ChartQA 74.6 Country211 27.6 DocVQA 96.2 EDIS 96.4 FashionIQ 44 GQA 92.5 HatefulMemes
77.4 ImageNet-1K 82.2 ImageNet-A 77.3 ImageNet-R 94.1 InfographicsVQA 87.9 MSCOCO 86 MSCOCO_i2t 79.6
MSCOCO_t2i 80.9 N24News 80.4 NIGHTS 72.9 OK-VQA 78 OVEN 79.1 ObjectNet 80.4 Place365 48.1 RefCOCO 95.8
RefCOCO-Matching 90.9 SUN397 82.9 ScienceQA 81 TextVQA 92.6 VOC2007 93.3 VisDial 87.4 Visual7W 70.6
Visual7W-Pointing 95.9 VisualNews_i2t 85.1 VisualNews_t2i 81.2 VizWiz 64.8 WebQA 91.8 Wiki-SS-NQ 88
ActivityNetQA 83.3 Breakfast 64.2 Charades-STA 33.43 DiDeMo 65.24 EgoSchema 68.4 HMDB51 86.8 K700 67.5
MSR-VTT 59.5 MSVD 76.57 MVBench 68.27 MomentSeeker 54.37 NExTQA 75.74 QVHighlight 80.06 SmthSmthV2 81.5
UCF101 95.3 VATEX 54.98 Video-MME 62.44 YouCook2 39.57 MMLongBench-doc 58.4 MMLongBench-page-fixed 59.79
ViDoRe_arxivqa 86.56 ViDoRe_biomedical_lectures_v2_multilingual 71.41 ViDoRe_docvqa 53.79
ViDoRe_economics_reports_v2_multilingual 66.02 ViDoRe_esg_reports_human_labeled_v2 68.86
ViDoRe_esg_reports_v2_multilingual 69 ViDoRe_infovqa 90.96 ViDoRe_shiftproject 84.35
ViDoRe_syntheticDocQA_artificial_intelligence 98.52 ViDoRe_syntheticDocQA_energy 94.04
ViDoRe_syntheticDocQA_government_reports 97.89 ViDoRe_syntheticDocQA_healthcare_industry 98.02
ViDoRe_tabfquad 97.01 ViDoRe_tatdqa 69.95 ViDoSeek-doc 86.18 ViDoSeek-page-fixed 86.99 VisRAG_ArxivQA 87.99
VisRAG_ChartQA 88.93 VisRAG_InfoVQA 94.67 VisRAG_MP-DocVQA 88.79 VisRAG_PlotQA 73.98 VisRAG_SlideVQA 96.8
"""
MEANS = {"overall": 80.12, "video": 67.62, "visdoc": 82.04, "mmeb_v2": 77.82}
"""As printed there, and over all 78 in results_qwen3vl8b_summary.csv at 4cce067."""
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
    known = read_tasks(tmp_path)
    assert len(known) == len(MMEB_TASKS) + len(V2_TASKS) == 78
    printed = dict(zip(PUBLISHED.split()[::2], map(float, PUBLISHED.split()[1::2]), strict=True))
    assert {name.removesuffix("-fixed") for name in printed} == set(known)
    for name, percent in printed.items():
        group = known[name.removesuffix("-fixed")].group.replace("overall", "image")
        values = {"hit@1": 0.0, "ndcg_linear@5": 0.0}
        values["ndcg_linear@5" if group == "visdoc" else "hit@1"] = percent / 100
        write_json(tmp_path / group / f"{name}_score.json", values)
    found = audit_scores(read_scores(tmp_path))
    assert found.report is not None
    assert (found.problems, found.report.partial_means) == ((), {})
    means = {name: 100 * mean["score"] for name, mean in found.report.means.items() if name in MEANS}
    assert means == pytest.approx(MEANS, abs=0.01), "both are rounded"
    alone = ScoreReport({name: found.report.tasks[name] for name in V2_TASKS})
    assert alone.partial_means == {"mmeb_v2": 42}


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
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_all_78_tasks_are_scored_by_one_or_two_processes_alike(
    family: str, data_dir: Path, tmp_path: Path
) -> None:
    backbone = save_tiny_family(family, tmp_path / "backbone")
    evaluate(backbone, data_dir, tmp_path / "one", 1)
    run_ranks(lambda: evaluate(backbone, data_dir, tmp_path / "two", 2))
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert set(one["tasks"]) == {*MMEB_TASKS, *V2_TASKS}
    assert one["means"].keys() >= {"overall", "video", "visdoc", "mmeb_v2"}
    assert (one["tasks"], one["means"]) == (two["tasks"], two["means"])
