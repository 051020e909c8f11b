"""Weights & Biases: offline on disk, no questions, and never the end of training."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.sections import WandbConfig
from pretrain.errors import InputError
from pretrain.observe import wandb_logger
from pretrain.observe.wandb_logger import WandbLogger


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.failure: Exception | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert name in ("step", "*")

    def log(self, metrics: dict[str, Any]) -> None:
        if self.failure:
            raise self.failure
        self.logged.append(metrics)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for the package that records how it is called; no login anywhere."""
    run, calls = FakeRun(), []
    module = SimpleNamespace(
        run=run,
        calls=calls,
        init=lambda **options: (calls.append(options), run)[1],
        Settings=SimpleNamespace,
        Table=SimpleNamespace,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


def test_it_is_offline_and_silent_unless_asked(fake: SimpleNamespace, tmp_path: Path) -> None:
    logger = WandbLogger(WandbConfig(), tmp_path / "tiny", {"train": {"steps": 3}})
    logger.log(1, {"loss": 2.0, "held_out_loss": None})
    logger.close()
    (options,) = fake.calls
    assert options["mode"] == "offline" and options["dir"] == str(tmp_path / "tiny") and options["name"] == "tiny"
    assert options["config"] == {"train": {"steps": 3}}
    assert options["settings"].silent is True and options["settings"].console == "off"
    assert fake.run.logged == [{"loss": 2.0, "step": 1}] and fake.run.finished


def test_samples_are_a_table(fake: SimpleNamespace, tmp_path: Path) -> None:
    WandbLogger(WandbConfig(), tmp_path, {}).log_samples(7, ["a", ""], ["b", "c"])
    table = SimpleNamespace(columns=["step", "prompt", "text"], data=[[7, "a", "b"], [7, "", "c"]])
    assert fake.run.logged == [{"samples": table, "step": 7}]


def test_online_without_a_login_is_refused_before_anything_starts(fake: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wandb\.mode=online needs a login: set WANDB_API_KEY"):
        WandbLogger(WandbConfig(mode="online"), tmp_path, {})
    assert fake.calls == []


def test_online_takes_a_key_from_the_environment_or_a_stored_login(
    fake: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example login user password not-a-real-key\n")
    (tmp_path / "netrc").chmod(0o600)
    with pytest.raises(InputError, match="needs a login"):
        WandbLogger(WandbConfig(mode="online"), tmp_path, {})
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    WandbLogger(WandbConfig(mode="online"), tmp_path, {})
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    WandbLogger(WandbConfig(mode="online", entity="lab", name="seven"), tmp_path, {})
    assert [call["mode"] for call in fake.calls] == ["online", "online"]
    assert fake.calls[1]["entity"] == "lab" and fake.calls[1]["name"] == "seven"


def test_a_damaged_login_file_is_no_login(fake: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("nonsense here")
    with pytest.raises(InputError, match="needs a login"):
        WandbLogger(WandbConfig(mode="online"), tmp_path, {})


def test_a_resumed_run_goes_on_under_its_id(fake: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("offline-run-20250101_120000-older", "run-20250301_120000-newest", "offline-run-20250201_120000-mid"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to("run-20250301_120000-newest")
    WandbLogger(WandbConfig(), tmp_path, {})
    WandbLogger(WandbConfig(), tmp_path / "new", {})
    assert [call["id"] for call in fake.calls] == ["newest", None]


def test_a_failure_while_logging_is_reported_once_and_training_goes_on(
    fake: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = WandbLogger(WandbConfig(), tmp_path, {})
    fake.run.failure = ConnectionError("service went away")
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            logger.log(step, {"loss": 1.0})
        logger.close()
    assert len(caplog.records) == 1 and "service went away" in caplog.text
    fake.run.failure = None
    logger.log(5, {"loss": 1.0})
    assert fake.run.logged == [{"loss": 1.0, "step": 5}], "it goes on when the service is back"


def test_a_run_that_cannot_start_is_refused_in_words(
    fake: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError("no such project")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(InputError, match="cannot be started .*no such project"):
        WandbLogger(WandbConfig(), tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="needs the package wandb"):
        WandbLogger(WandbConfig(), tmp_path, {})


def test_the_package_is_imported_only_when_used() -> None:
    assert not hasattr(wandb_logger, "wandb")


def test_the_real_package_writes_below_the_run_directory_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_directory = tmp_path / "tiny"
    run_directory.mkdir()
    logger = WandbLogger(WandbConfig(project="test"), run_directory, {"train": {"steps": 2}})
    logger.log(1, {"loss": 2.0, "skipped": False})
    logger.log(1, {"loss": 1.5, "skipped": False})  # a step trained again after a crash
    logger.log_samples(1, ["the state"], [" of a model\ufffd"])
    logger.close()
    assert [entry.name for entry in run_directory.iterdir()] == ["wandb"]
    (record,) = run_directory.glob("wandb/offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0
    assert wandb_logger._earlier_id(run_directory / "wandb") in record.name
    (table,) = run_directory.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[1, "the state", " of a model\ufffd"]]
    assert capfd.readouterr() == ("", "")
