"""The ``lightning`` command: runs in one folder, which value wins, and how mistakes are shown."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel_decoupling import cli, lightning_cli
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.files import locked
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import small_config
from tests.support.mmeb import save_tiny_mmeb
from tests.support.processes import run_ranks

BLOCKED = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'lightning', 'transformers', 'jsonargparse')))\n"
)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def config_file(tiny_backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    options = {"max_steps": 2, "default_root_dir": str(folder / "runs" / "demo")}
    config = small_config(tiny_backbone_dir, save_tiny_mmeb(folder / "data"), **options)
    (folder / "demo.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "demo.yaml"


@pytest.fixture(scope="module")
def run_dir(config_file: Path) -> Path:
    """A finished run with a temperature of its own."""
    cli.main(["fit", "--config", str(config_file), "--model.temperature", "0.3"])
    return config_file.parent / "runs" / "demo"


def settings(run_dir: Path) -> dict[str, object]:
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return dict(content["hyper_parameters"])


def test_help_needs_neither_torch_nor_lightning_and_the_package_is_lazy_and_knows_its_version() -> None:
    code = "import parallel_decoupling as p; print(p.__version__, 'PDFEmbedder' in dir(p))\n"
    code += "from parallel_decoupling.cli import main; main(['--help'])"
    first, help_text = python(BLOCKED + code).split("\n", 1)
    assert re.fullmatch(r"\d\S* True", first)
    assert all(f"  {name} " in help_text for name in ("fit", "validate", "test", "predict", "compare"))


def test_a_fit_keeps_everything_in_one_folder(run_dir: Path) -> None:
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()
    assert (run_dir / "config.yaml").is_file()
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert settings(run_dir)["temperature"] == 0.3


def test_the_same_fit_again_refuses_to_overwrite_the_run(
    run_dir: Path, config_file: Path, mistake: Any
) -> None:
    file = run_dir / "checkpoints" / "last.ckpt"
    before = file.read_bytes()
    shown = mistake(["fit", "--config", str(config_file)])
    assert str(file) in shown
    assert all(way in shown for way in ("--ckpt_path last", "default_root_dir", "remove the folder"))
    assert file.read_bytes() == before
    cli.main(["fit", "--config", str(config_file), "--trainer.fast_dev_run", "1"])
    cli.main(["plan", "--config", str(config_file)])
    assert file.read_bytes() == before


def test_the_end_of_a_run_is_in_the_last_checkpoint_with_validations_between(
    config_file: Path, tmp_path: Path
) -> None:
    command = ["fit", "--config", str(config_file), "--trainer.default_root_dir", str(tmp_path)]
    validations = ["--data.validation_tasks=[colours_t2i]", "--trainer.val_check_interval", "2"]
    cli.main([*command, *validations, "--trainer.max_steps", "5"])
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 5


def test_a_broken_image_is_one_message_from_a_worker_too(
    config_file: Path, tmp_path: Path, mistake: Any
) -> None:
    data_dir = tmp_path / "data"
    shutil.copytree(config_file.parent / "data", data_dir)
    for file in (data_dir / "MMEB-train").rglob("*.png"):
        file.write_bytes(b"broken")
    places = ["--trainer.default_root_dir", str(tmp_path), "--data.data_dir", str(data_dir)]
    shown = mistake(["fit", "--config", str(config_file), *places, "--data.num_workers", "1"])
    assert "error: training subset 'colours_" in shown


def test_resuming_keeps_what_was_not_typed_and_shows_what_was(
    run_dir: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--trainer.max_steps", "3", "--model.mi_weight", "0.7", "--data.seed", "4"]
    cli.main(["fit", "--config", str(config_file), "--ckpt_path", "last", *typed])
    shown = capsys.readouterr().err
    after = settings(run_dir)
    assert (after["temperature"], after["mi_weight"]) == (0.3, 0.7)
    for words in (("model.mi_weight", "0.7", "0.0", "yours"), ("data.seed", "4", "0", "yours")):
        assert any(all(word in line for word in words) for line in shown.splitlines()), shown
    assert "temperature" not in shown
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    again = (run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "ckpt_path: null" in again  # given to another fit, it starts anew


def test_a_test_takes_the_structure_of_the_checkpoint(
    run_dir: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(run_dir / "checkpoints" / "last.ckpt")
    cli.main(["test", "--config", str(config_file), "--ckpt_path", file, "--model.num_paths", "3"])
    captured = capsys.readouterr()
    line = next(line for line in captured.err.splitlines() if "model.num_paths" in line)
    assert "the checkpoint's" in line
    report = ScoreReport.from_json_file(run_dir / "scores.json")
    assert report.columns == ["aggregate", "path_0", "path_1", "mean", "concat", "maxsim"]
    assert report.run["global_step"] >= 2
    assert report.run["model"]["temperature"] == 0.3
    assert "hit@1 in percent" in captured.out
    fitted = (run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "verbose" not in fitted  # a test has written beside it, so fit still takes it
    assert (run_dir / "test_config.yaml").is_file()


def test_predict_says_that_a_model_is_untrained(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cli.main(["predict", "--config", str(config_file), "--trainer.default_root_dir", str(tmp_path)])
    assert "before any training" in caplog.text


def test_predict_embeds_a_folder_of_images_and_resumes(run_dir: Path, mistake: Any) -> None:
    """The first command of docs/embedding_files.md."""
    embeddings, file = run_dir.parent / "embeddings", str(run_dir / "checkpoints" / "last.ckpt")
    places = {"runs/demo/checkpoints/compressed.ckpt": file, "embeddings/": str(embeddings)}
    places["photos/"] = str(run_dir.parents[1] / "data" / "MMEB-eval")
    text = (Path(__file__).parents[1] / "docs" / "embedding_files.md").read_text(encoding="utf-8")
    words = next(line for line in text.splitlines() if line.startswith("parallel-decoupling predict")).split()
    command = [places.get(word, word) for word in words[1:]]
    assert set(places.values()) < set(command)
    cli.main(command)
    store = Store(embeddings)
    assert (len(store), store.columns) == (24, ("aggregate", "path_0", "path_1"))
    assert store.metadata["model"] == file
    assert {file.suffix for file in embeddings.iterdir()} == {".parquet", ".jsonl"}, "no config with paths"
    assert not list(embeddings.glob("events*"))
    shown = mistake([*command, "--output_dtype", "float16"])
    assert "embeddings-00000.parquet was written with another dtype" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.num_pats", "3"], "num_pats"),
        (["--model.num_paths", "three"], "num_paths"),
        (["--model.prefix_length", "0"], "set num_paths=1"),
        (
            ["--model.optimizer.schedule", "linear", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
            "no end",
        ),
        (["--data.data_dir", "nowhere"], "nowhere"),
        (["--data.train_subsets", "[colors_i2t]"], "colours_i2t"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--ckpt_path", __file__], "is not a checkpoint"),
        (["--data.num_workers=-1"], "data.num_workers must be 0 or more"),
        (["--trainer.gradient_clip_val", "1.0"], "gradient_clip_val"),
        (["--trainer.accumulate_grad_batches", "2"], "model.chunk_size (GradCache)"),
        (["--trainer.precision", "16-true"], "bf16-mixed"),
        (["--trainer.max_steps", "0"], "No main step would be made"),
        (["--trainer.limit_train_batches", "0"], "No main step would be made"),
        (["--data.batch_size", "1"], "data.batch_size=1 leaves a query nothing"),
    ],
)
def test_a_mistake_is_one_message_before_any_training(
    arguments: list[str], words: str, config_file: Path, tmp_path: Path, mistake: Any
) -> None:
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    shown = mistake(["fit", "--config", str(config_file), *folder, *arguments])
    assert words in shown
    assert "--model.prefix_init" not in shown  # no list of all options
    assert {file.name for file in tmp_path.iterdir()} <= {"hparams.yaml"}, "the next fit may start here"


def test_a_tilde_means_the_same_folder_for_guard_lock_and_lightning(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "list.yaml").write_text("[1]", encoding="utf-8")
    assert "home/list.yaml: the options" in mistake(["fit", "--config=~/list.yaml"])
    command, run = ["fit", "--config", str(config_file)], tmp_path / "home" / "run"
    Path("own.yaml").write_text("trainer: {default_root_dir: ~/run}\n", encoding="utf-8")
    command += ["--config", "own.yaml"]
    with locked(run):
        for words in ([], ["--ckpt_path", "best"]):
            assert f"error: {run} is in use by process {os.getpid()}" in mistake([*command, *words])
    (run / "link").mkdir(parents=True)
    (tmp_path / "home" / "there").symlink_to(run)
    cli.main([*command, "--trainer.max_steps", "1"])
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert str(run) in mistake(command)
    assert str(run) in mistake([*command, "--ckpt_path", "best"])
    with locked(tmp_path / "home" / "there"):
        assert "in use" in mistake([*command, "--ckpt_path", "last"])
    with locked(tmp_path / "home" / "emb"):
        assert "emb is in use" in mistake(["predict", "--config", str(config_file), "--output_dir=~/emb"])
    assert not Path("~").exists()


def test_checkpoints_of_two_runs_do_not_share_a_folder(
    config_file: Path, tmp_path: Path, mistake: Any
) -> None:
    """Not even while the other run has not written any."""
    options = {"dirpath": str(tmp_path / "shared"), "save_last": True}
    kind = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({"trainer": {"callbacks": [kind]}}))
    folder = ["--trainer.default_root_dir", str(tmp_path / "run")]
    with locked(tmp_path / "shared"):
        shown = mistake(["fit", "--config", str(config_file), "--config", str(own), *folder])
    assert f"{tmp_path / 'shared'} is in use by process" in shown


def interrupted() -> None:
    with cli._stopped_at_once(), suppress(KeyboardInterrupt):  # as an import might
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_ends_the_process_while_packages_are_loaded() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[-2\]"):
        run_ranks(interrupted, processes=1)
    before = signal.getsignal(signal.SIGINT)
    with cli._stopped_at_once():
        pass
    assert signal.getsignal(signal.SIGINT) == before


def test_unknown_subcommands_are_named(mistake: Any) -> None:
    assert "'fti'" in mistake(["fti"])
    assert "no scores.json in only_one" in mistake(["compare", "only_one"])


def test_errors_of_other_packages_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_cli, "run", lambda _: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["fit"])


def test_the_demo_s_configuration_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", "demo.yaml", "--print_config"])
    assert stop.value.code == 0
    assert "num_paths: 3" in capsys.readouterr().out
    Path("demo.yaml").write_text("model:\n  num_paths: 2\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "demo.yaml", "--print_config"])
    assert "num_paths: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        (
            "fit",
            "--trainer.devices=-3",
            "one of the trainer's options cannot be used: `devices`",
        ),  # a TypeError
        ("fit", "--trainer.devices=0", "not a valid input"),  # Lightning's MisconfigurationException
        ("fit", "--trainer.strategy=ddpp", "invalid strategy name"),
        ("fit", "--trainer.strategy=fsdp", "requires a GPU"),
        ("fit", "--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch must be 1 or more"),
        ("fit", "--trainer.log_every_n_steps=-1", "log_every_n_steps must be 0 or more"),
        ("fit", "--trainer.max_time=x", "max_time"),
        ("fit", "--trainer.max_time=00:00:00:00", "nothing was trained: the run ended before its first step"),
        ("fit", "--trainer.val_check_interval=0", "val_check_interval must be above 0, got 0"),
        ("predict", "--trainer.limit_predict_batches=0", "limit_predict_batches must be above 0, got 0"),
        ("fit", "--trainer.default_root_dir=null", "default_root_dir must be a valid string, got None"),
        ("fit", "--model.attention=flash_attention_2", "a package for attention='flash_attention_2'"),
        ("fit", "--model.attention=flex_attention", "attention=flex_attention trains on a GPU only"),
        ("fit", "--trainer.default_root_dir=\udcff", "is not a name in UTF-8"),
        ("predict", "--output_dir=\udcff", "is not a name in UTF-8"),
        ("fit", "--model.quantization=4bit", "a package for attention='sdpa', quantization='4bit'"),
        ("fit", "--seed_everything=-1", "seed_everything must be from 0 to 4294967295"),
        (
            "fit",
            "--trainer.default_root_dir=",
            "default_root_dir must be the path of a file or folder, got ''",
        ),
        ("fit", "--data.data_dir=https://a.example/b", "data_dir must be the path of a file or folder"),
        ("plan", "--trainer.precision=64", "trainer.precision=64 does not work"),
        ("plan", "--trainer.devices=-3", "trainer.devices=-3 cannot be planned"),
        ("plan", "--gpu_memory_gib=.nan", "gpu_memory_gib must be above 0"),
    ],
)
def test_what_lightning_refuses_or_takes_unchecked_is_one_message(
    command: str, option: str, words: str, tmp_path: Path, mistake: Any
) -> None:
    places = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"]
    assert words in mistake([command, "--config", "demo.yaml", *places, option])


def test_names_that_no_file_can_have_and_samples_of_nothing_are_refused(mistake: Any) -> None:
    with pytest.raises(ValueError, match="has no config that can be read"):
        PDFEmbedder(backbone="x" * 5000)
    assert "sample must be 1 or more" in mistake(["verify", "data", "--sample", "0"])
    assert "or 'mini-mmeb' for the embedded benchmark" in mistake(["verify", "nowhere"])


def test_a_run_is_not_overwritten_by_one_that_continues_another(
    run_dir: Path, config_file: Path, tmp_path: Path, mistake: Any
) -> None:
    shutil.copytree(run_dir, tmp_path / "other")
    checkpoint = f"--ckpt_path={run_dir / 'checkpoints' / 'last.ckpt'}"
    command = ["fit", "--config", str(config_file), f"--trainer.default_root_dir={tmp_path / 'other'}"]
    assert "is there already, and this fit would overwrite its run" in mistake([*command, checkpoint])
    shutil.copytree(run_dir, tmp_path / "other" / "older")
    checkpoint = f"--ckpt_path={tmp_path / 'other' / 'older' / 'checkpoints' / 'last.ckpt'}"
    assert "is there already, and this fit would overwrite its run" in mistake([*command, checkpoint])


def test_the_table_of_another_run_is_not_emptied(config_file: Path, tmp_path: Path, mistake: Any) -> None:
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": str(tmp_path), "name": "", "version": ""}
    command = ["fit", "--config", str(config_file), f"--trainer.default_root_dir={tmp_path / 'new'}"]
    assert "metrics.csv is there already" in mistake([*command, f"--trainer.logger={json.dumps(logger)}"])


def test_a_finished_run_without_validation_resumes_with_a_warning(config_file: Path, tmp_path: Path) -> None:
    """Its last step ended an epoch, after which a validation would have been due."""
    options = ["--trainer.limit_train_batches=2", "--trainer.max_steps=2", "--data.validation_tasks=[]"]
    command = ["fit", "--config", str(config_file), f"--trainer.default_root_dir={tmp_path}", *options]
    cli.main(command)
    with pytest.warns(UserWarning, match="Nothing was trained"):
        cli.main([*command, "--ckpt_path=last"])


def test_configuration_files_that_are_not_tables_of_options_are_named(tmp_path: Path, mistake: Any) -> None:
    file, grows = tmp_path / "a.yaml", b"a: &a [1,1,1,1,1,1,1,1]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        grows += f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n".encode()
    for content in (
        b"model: null",
        b"[1]",
        b"caf\xe9: 1",
        b"\xff\xfea",
        b"a: [",
        b"&a [*a]",
        b"a: &a [*a]",
        b"a: " + b"[" * 3000,
        grows,
    ):
        file.write_bytes(content)
        for words in (["--config", str(file)], [f"--config={file}"], [f"--data={file}"]):
            assert str(file) in mistake(["fit", *words]) or content == b"model: null"
