"""Real runs for tests: a small corpus, a configuration file on it, and the command in processes of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.configurations import TINY_MODEL
from tests.workers import start_methods

WORDS = "the state of a recurrent model is carried from token to token until a document ends".split()


def write_corpus(directory: Path, documents: int = 60) -> Path:
    """Text files that a model can learn from in a few steps."""
    directory.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    for index in range(documents):
        text = " ".join(source.choices(WORDS, k=source.randint(20, 120)))
        (directory / f"{index:03}.txt").write_text(text + "\n")
    return directory


def raw_config(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a dozen steps over :func:`write_corpus`; ``sections`` add to or replace its keys."""
    model = json.loads(json.dumps(TINY_MODEL)) | {"hidden_size": 32, "num_layers": 2}
    raw: dict[str, Any] = {
        "run": {"directory": str(directory / "run")},
        "model": model,
        "data": {
            "source": {"type": "text_files", "path": str(directory / "corpus"), "pattern": "*.txt"},
            "tokenizer": {"type": "bytes"},
            "sequence_length": 32,
            "held_out_fraction": 0.2,
        },
        "parallel": {"zero": 1},
        "optimizer": {"learning_rate": 3e-3, "epsilon": 1e-5},
        "schedule": {"warmup_steps": 2},
        "train": {
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "device": "cpu",
            "evaluate_every": 6,
            "evaluate_samples": 8,
            "checkpoint_every": 4,
            "keep_last": 10,
        },
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


def write_config(directory: Path, **sections: dict[str, Any]) -> Path:
    """The same as a file, its corpus beside it."""
    if not (directory / "corpus").exists():
        write_corpus(directory / "corpus")
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(directory, **sections)))
    return path


def environment() -> dict[str, str]:
    """For a process of its own: one thread, and no rank of a surrounding launcher."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def pretrain_command(*arguments: object, processes: int = 0) -> list[str]:
    """``python -m pretrain ...``, under torchrun where ``processes`` is given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "pretrain", *map(str, arguments)]


def pretrain_anew(*arguments: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end as a shell would, so that it imports torch and the rest for itself."""
    command = pretrain_command(*arguments, processes=processes)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, its output as text; at the end of the context it is killed with all that it started.

    Args:
        command: with its arguments.
        options: of ``Popen``.
    """
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            kill_with_children(process)


def kill_with_children(process: subprocess.Popen) -> None:
    """Ends a process that may have ended; a launcher's workers would else go on without it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        running = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


class Running:
    """A command in a process of its own that begins with what :mod:`tests.workers` has imported.

    The process is killed, if need be, at the end of the context.

    Args:
        module: to run as ``python -m module``.
        arguments: of the command.
        variables: of the environment, beside those of :func:`environment`.

    Attributes:
        stdout, stderr: what it prints, to be read.
        pid: of the process.
    """

    def __init__(self, module: str, *arguments: object, variables: dict[str, str] | None = None):
        _, context = start_methods()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self.arguments = [module, *map(str, arguments)]
        self._process = context.Process(
            target=_run_module,
            args=(self.arguments, os.getcwd(), environment() | (variables or {}), *(theirs for _, theirs in pipes)),
        )
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(ours.fileno())) for ours, _ in pipes)
        for connection in itertools.chain(*pipes):
            connection.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Waits for its end; what has not been read of its output is in the result."""
        with ThreadPoolExecutor(1) as beside:
            errors = beside.submit(self.stderr.read)
            output = self.stdout.read()
        # Whoever closes both has at most to end.
        self._process.join(60)
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, output, errors.result())


def _run_module(
    arguments: list[str], directory: str, variables: dict[str, str], stdout: Connection, stderr: Connection
) -> None:
    for stream, pipe in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(pipe.fileno(), stream.fileno())
        stream.reconfigure(write_through=True)
        pipe.close()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def pretrain(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in one process or in as many as a launcher would start for ``ranks``.

    Of several ranks the result has the highest exit code and the output of one after the other.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    variables: list[dict[str, str]] = [{}]
    if ranks > 1:
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | sizes
        variables = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Running("pretrain", *arguments, variables=own)) for own in variables]
        with ThreadPoolExecutor(ranks) as beside:
            ended = list(beside.map(Running.finish, running))
    return subprocess.CompletedProcess(
        ended[0].args,
        max(process.returncode for process in ended),
        "".join(process.stdout for process in ended),
        "".join(process.stderr for process in ended),
    )


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step stands twice"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def assert_same_curve(found: dict[int, tuple[float, float]], expected: dict[int, tuple[float, float]]) -> None:
    """Every step's loss and gradient norm, of float32 runs that made their sums in another order."""
    assert found.keys() == expected.keys()
    for step, figures in expected.items():
        # A rounding is 6e-8; what a layout gets wrong shows as 1e-3.
        assert found[step] == pytest.approx(figures, rel=1e-6), f"step {step}"
