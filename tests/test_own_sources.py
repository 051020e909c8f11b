"""Our own sources never call what would execute a file's contents, or trust a stranger's code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("pretrain", "data", "kernels") for path in (ROOT / folder).rglob("*.py"))

# Modules that read objects of any class, which may run code, and calls that run text or a shell.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "runpy.run_path"}
CALLS |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load"}
OPTIONS = {"weights_only", "allow_pickle", "trust_remote_code", "shell"}

# file -> what may stand in it, and why.
EXCEPTIONS = {
    # The model that was exported a moment ago, in the directory that it was written to, is loaded with its own code.
    "pretrain/convert/comparison.py": {"trust_remote_code=True"},
    # What DeepSpeed itself wrote in the same benchmark, in a temporary directory, and it writes nothing else.
    "pretrain/bench/checkpoint_contestants.py": {"torch.load without weights_only=True"},
}


def findings(tree: ast.AST) -> Iterator[str]:
    """What a module does that it should not, each as it is named in ``EXCEPTIONS``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg in OPTIONS}
        if name in CALLS:
            yield name
        if name == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name.endswith(("np.load", "numpy.load")) and options.get("allow_pickle", "False") != "False":
            yield "numpy.load with allow_pickle"
        if options.get("trust_remote_code", "False") != "False":
            yield f"trust_remote_code={options['trust_remote_code']}"
        if options.get("shell", "False") != "False":
            yield f"{name} with shell={options['shell']}"


def test_nothing_in_our_sources_executes_what_it_reads() -> None:
    assert len(SOURCES) > 200
    found = {}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if here := set(findings(ast.parse(path.read_text(encoding="utf-8")))):
            found[name] = here
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", "import pickle"),
        ("from dill import loads", "import dill"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("eval(text)", "eval"),
        ("AutoModel.from_pretrained(path, trust_remote_code=trusted)", "trust_remote_code=trusted"),
        ("subprocess.run(text, shell=True)", "subprocess.run with shell=True"),
        ("np.load(path, allow_pickle=True)", "numpy.load with allow_pickle"),
    ],
)
def test_it_would_be_seen(source: str, expected: str) -> None:
    assert list(findings(ast.parse(source))) == [expected]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(text)",
        "np.load(path)",
    ],
)
def test_what_is_harmless_is_let_pass(source: str) -> None:
    assert list(findings(ast.parse(source))) == []
