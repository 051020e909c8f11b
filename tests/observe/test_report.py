"""The picture of runs: that it is drawn from the figures, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pretrain.errors import InputError
from pretrain.observe.metrics import MetricsLog
from pretrain.observe.report import draw_report


def make_run(directory: Path, steps: int, bytes_per_token: float | None = 1.0, **constant: Any) -> Path:
    """A run whose loss falls as 1/step, evaluated every 10 steps."""
    directory.mkdir(parents=True)
    with MetricsLog(directory / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            record: dict[str, Any] = {
                "step": step,
                "loss": 1 + 4 / step,
                "grad_norm": 1 / step,
                "learning_rate": 1e-3,
                "tokens_per_second": 5000.0,
                "skipped": False,
                **constant,
            }
            if step % 10 == 0:
                record["held_out_loss"] = 1.1 + 4 / step
                if bytes_per_token is not None:
                    record["held_out_bits_per_byte"] = record["held_out_loss"] / math.log(2) / bytes_per_token
            log.append(record)
    return directory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look inside."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep_and_save(figure: Figure, path: Path, dpi: int) -> None:
        figures.append(figure)
        save(figure, path, dpi=dpi // 8)  # drawn in full, only coarser, to be quick

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    return figures


def test_a_picture_holds_what_was_logged(tmp_path: Path, drawn: list[Figure]) -> None:
    run = make_run(tmp_path / "tiny", 40)
    output = draw_report([run], tmp_path / "pictures" / "tiny.png")
    assert output == tmp_path / "pictures" / "tiny.png"
    assert output.read_bytes().startswith(b"\x89PNG")
    loss, learning_rate, norm, speed = drawn[0].axes[:4]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [1 + 4 / step for step in range(1, 41)])
    np.testing.assert_array_equal(loss.lines[1].get_xdata(), [10, 20, 30, 40])
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [1.5, 1.3, 1.1 + 4 / 30, 1.2])
    np.testing.assert_allclose(norm.lines[0].get_ydata(), [1 / step for step in range(1, 41)])
    assert norm.get_yscale() == "log"
    assert set(learning_rate.lines[0].get_ydata()) == {1e-3} and set(speed.lines[0].get_ydata()) == {5000.0}
    right = loss.child_axes[0]
    assert right.get_ylabel() == "bits per byte"
    assert right._functions[0](math.log(2)) == pytest.approx(1.0), "one byte a token: 1 bit is ln 2 nats"
    assert "tiny: 40 steps, training loss 1.100, held-out loss 1.200, 1.731 bits per byte" in legend(drawn[0])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_long_runs_are_smoothed_over_the_raw_line(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_report([make_run(tmp_path / "long", 300)], tmp_path / "long.png")
    raw, smooth, _ = drawn[0].axes[0].lines
    assert raw.get_alpha() < 0.5
    # A window of 7 steps, cut off at both ends.
    np.testing.assert_allclose(smooth.get_ydata()[100], raw.get_ydata()[97:104].mean())
    np.testing.assert_allclose(smooth.get_ydata()[0], raw.get_ydata()[:4].mean())
    np.testing.assert_allclose(smooth.get_ydata()[-1], raw.get_ydata()[-4:].mean())


def test_runs_are_overlaid_and_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_run(tmp_path / "a" / "same", 20), make_run(tmp_path / "b" / "same", 30)]
    draw_report(runs, tmp_path / "both.png")
    assert [text.split(":")[0] for text in legend(drawn[0])] == ["a/same", "b/same"]
    assert len({line.get_color() for line in drawn[0].axes[1].lines}) == 2
    assert drawn[0].axes[0].child_axes, "one tokenizer: bits per byte are shared"


@pytest.mark.parametrize("other", [4.0, None])
def test_runs_without_a_common_ratio_have_no_bits_per_byte_axis(
    tmp_path: Path, drawn: list[Figure], other: float | None
) -> None:
    runs = [make_run(tmp_path / "bytes", 20), make_run(tmp_path / "tokens", 20, other)]
    draw_report(runs, tmp_path / "both.png")
    assert not drawn[0].axes[0].child_axes


def test_mfu_is_drawn_where_a_run_knows_it(tmp_path: Path, drawn: list[Figure]) -> None:
    known = make_run(tmp_path / "known", 20, model_flops_utilization=0.375, tflops_per_second=150.0)
    draw_report([known, make_run(tmp_path / "unknown", 30)], tmp_path / "both.png")
    mfu, work = drawn[0].axes[4:6]
    (line, missing), (done, _) = mfu.lines, work.lines
    assert set(line.get_ydata()) == {37.5} and len(line.get_xdata()) == 20 and mfu.get_ylim()[0] == 0
    assert missing.get_xdata().size == 0 and set(done.get_ydata()) == {150.0}
    assert "MFU" in mfu.get_title("left") and mfu.get_xlabel() == work.get_xlabel() == "step"
    draw_report([tmp_path / "unknown"], tmp_path / "unknown.png")
    assert len(drawn[1].axes) == 4


def test_skipped_steps_and_missing_figures_do_not_stop_it(tmp_path: Path, drawn: list[Figure]) -> None:
    run = make_run(tmp_path / "bad", 3, grad_norm=float("nan"), tokens_per_second=None)
    draw_report([run], tmp_path / "bad.png")
    assert [text.get_text() for text in drawn[0].axes[2].texts] == ["not logged"]
    assert [text.get_text() for text in drawn[0].axes[3].texts] == ["not logged"]


def test_one_step_is_a_point(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_report([make_run(tmp_path / "one", 1)], tmp_path / "one.png")
    assert drawn[0].axes[0].lines[0].get_marker() == "o"


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with pytest.raises(InputError, match=r"nowhere has no metrics\.jsonl"):
        draw_report([run, tmp_path / "nowhere"], tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="holds no step yet"):
        draw_report([tmp_path / "empty"], tmp_path / "x.png")
    with pytest.raises(InputError, match=r"must end in one of \.png"):
        draw_report([run], tmp_path / "x.doc")
    with pytest.raises(InputError, match="at least one"):
        draw_report([], tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot be written"):
        draw_report([run], run / "metrics.jsonl" / "x.png")
    assert not (tmp_path / "x.png").exists()
