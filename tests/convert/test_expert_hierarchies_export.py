"""Export of hierarchies with experts in every network: logits are ours in a process that has no code of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.convert import export_model
from tests.convert.checkpoints import random_tokens, write_run
from tests.convert.test_custom_export import code_cache
from tests.models.expert_models import expert_model
from tests.models.hat_models import WORDS, random_words
from tests.models.test_hnet import first_only

pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")

__all__ = ["code_cache"]

_ALONE = """
import importlib.util, sys
from pathlib import Path

# An editable installation adds either a finder of its own or the repository's path.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if not (Path(path) / "pretrain").exists()]
for name in ("pretrain", "kernels", "data"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported"

import torch
from transformers import AutoModelForCausalLM

expected = torch.load(sys.argv[1])
for directory, (inputs, logits) in expected.items():
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert any("router_cell" in name for name in model.state_dict() if not name.startswith("shared."))
    tokens = inputs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-4, rtol=0)
        if "word_starts" in inputs:
            continue
        parts, cache = [], None
        for piece in tokens.split([20, 1, 1, 18], 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache = output.past_key_values
        torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)
"""


def test_logits_are_ours_where_none_of_our_code_is(tmp_path: Path, code_cache: Path) -> None:
    expected, tokens = {}, random_tokens(3, 40)
    words = random_words(first_only(tokens), 4)
    for kind, data, given in (("hnet", {}, {}), ("hat", WORDS, {"word_starts": words})):
        # Without mLSTM, whose cells with random weights amplify rounding.
        model = json.loads(json.dumps(expert_model(kind)))
        model["blocks"]["inner"]["mixer"] = model["blocks"]["recurrent"]["mixer"]
        run, decoder = write_run(tmp_path / kind, model, data=data)
        report = export_model(run, tmp_path / f"{kind}_exported")
        assert report.needs_code and report.comparison.tolerance == 1e-4
        logits, _ = decoder.logits(tokens, **given)
        assert logits.std() > 0.5
        expected[str(tmp_path / f"{kind}_exported")] = ({"input_ids": tokens, **given}, logits)
    torch.save(expected, tmp_path / "expected.pt")
    found = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr
