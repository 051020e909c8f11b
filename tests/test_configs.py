"""Configuration files that ship load and say what they are; wrong ones are refused in one clear sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pretrain.config import Config, dump_config, load_config, load_data_config, parse_config
from pretrain.config.layout import check_world_size
from pretrain.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = [path for path in FILES if path.parent == CONFIGS or path.parent.name in ("runs", "recall")]
MODELS = sorted((CONFIGS / "models").rglob("*.yaml"))
SECTIONS = {
    "models": {"model"},
    "data": {"data"},
    "parallel": {"parallel"},
    "recipes": {"data", "optimizer", "schedule", "train"},
}
QUICKSTART = CONFIGS / "quickstart.yaml"


def _name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def _message(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, overrides)
    return str(caught.value)


def _file(directory: Path, text: str, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def _hnet(*widths: int, decoder: str = "mlstm", ratio: float = 4) -> str:
    """An override that puts stages of these widths round the model."""
    stages = [
        f"{{hidden_size: {width}, encoder: [mlstm], decoder: [{decoder}], target_ratio: {ratio}}}" for width in widths
    ]
    return f"model.hierarchy={{type: hnet, stages: [{', '.join(stages)}]}}"


WORDS = "data.tokenizer.type=hierarchical_bytes"


def _hat(num_heads: int = 4) -> str:
    """An override that puts bytes round the model, which then reads words."""
    return f"model.hierarchy={{type: hat, hidden_size: 64, encoder: [mlstm], decoder: [mlstm], num_heads: {num_heads}}}"


@pytest.mark.parametrize("path", RUNS, ids=_name)
def test_run_loads_and_survives_being_written_out(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, Config)
    assert parse_config(yaml.safe_load(dump_config(config)), "dumped") == config
    assert config.run.directory == f"runs/{path.stem}"


@pytest.mark.parametrize("path", [path for path in FILES if path not in RUNS], ids=_name)
def test_file_of_sections_holds_those_of_its_folder_and_fits_a_run(path: Path) -> None:
    sections = SECTIONS[path.relative_to(CONFIGS).parts[0]]
    raw = yaml.safe_load(path.read_text())
    assert raw and set(raw) <= sections
    run = load_config(QUICKSTART).model_dump(mode="json")
    if raw.get("parallel", {}).get("tensor", 1) > run["model"]["blocks"]["mlstm"]["mixer"]["num_heads"]:
        run["model"] = yaml.safe_load((CONFIGS / "models/xlstm/7b.yaml").read_text())["model"]
    if raw.get("parallel", {}).get("expert", 1) > 1:
        run["model"] = yaml.safe_load((CONFIGS / "models/xlstm_moe/20b.yaml").read_text())["model"]
    if raw.get("model", {}).get("hierarchy", {}).get("type") == "hat":
        run["data"]["tokenizer"] = {"type": "hierarchical_bytes"}
    if sections == SECTIONS["recipes"]:
        # A recipe leaves to each run how long it is.
        run["train"]["steps"] = 10**6
        raw = {name: {**run[name], **section} for name, section in raw.items()}
    parse_config({**run, **raw}, _name(path))


def test_every_model_has_a_run_and_every_family_a_tiny_one() -> None:
    models = {"_".join(path.relative_to(CONFIGS / "models").with_suffix("").parts): path for path in MODELS}
    runs = {path.stem: path for path in RUNS if path.parent.name == "runs"}
    assert set(models) <= set(runs)
    for name, path in models.items():
        stated = yaml.safe_load(path.read_text())["model"]
        bases = [(runs[name].parent / base).resolve() for base in yaml.safe_load(runs[name].read_text())["base"]]
        assert path.resolve() in bases, f"{runs[name]} is not built on {path}"
        used = {block.name for block in load_config(runs[name]).model.used_blocks()}
        assert set(stated["blocks"]) == used, f"{path} names blocks that no layer uses"
    for family in {path.parent.name for path in MODELS}:
        tiny = load_config(runs[f"{family}_tiny"])
        assert tiny.data.source.type == "standard_library"
        assert tiny.train.steps == 200


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_begins_with_what_it_is_and_its_command(path: Path) -> None:
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    assert len(comment) >= 2 and comment[0]
    commands = [line for line in comment if re.search(r"(python|torchrun .*) -m pretrain train configs/", line)]
    assert commands, f"{path} names no command"
    for command in commands:
        configuration, *overrides = command.split(" train ")[1].split()
        load_config(CONFIGS.parent / configuration, overrides)


SMALL_LAYOUTS = [
    path for path in FILES if path.parent.name == "parallel" and "data" in yaml.safe_load(path.read_text())["parallel"]
]


@pytest.mark.parametrize("path", SMALL_LAYOUTS, ids=_name)
def test_small_layouts_are_what_their_command_says(path: Path) -> None:
    command = next(line for line in path.read_text().splitlines() if "-m pretrain train" in line)
    started = re.search(r"--nproc-per-node (\d+)", command)
    configuration, *overrides = command.split(" train ")[1].split()
    config = load_config(CONFIGS.parent / configuration, overrides)
    stated = yaml.safe_load(path.read_text())["parallel"]
    assert {key: getattr(config.parallel, key) for key in stated} == stated
    assert check_world_size(config, int(started[1]) if started else 1) is None


def test_seven_billion_follow_the_published_recipe() -> None:
    config = load_config(CONFIGS / "runs/xlstm_7b.yaml")
    assert (config.train.global_batch_size, config.data.sequence_length) == (512, 8192)
    assert (config.optimizer.learning_rate, config.optimizer.gradient_clip) == (4e-4, 0.5)
    assert (config.schedule.warmup_steps, config.schedule.final_fraction) == (3000, 0.1)
    assert (config.train.precision, config.train.recompute) == ("bfloat16", "block")


def test_quickstart_can_be_shared_by_two_processes() -> None:
    config = load_config(QUICKSTART)
    assert check_world_size(config, 1) is None
    assert check_world_size(config, 2) is None
    assert config.model.vocab_size % 8 == 0 and config.model.vocab_size >= 257


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("train.stepz=3", "train.stepz", "did you mean 'steps'?"),
        ("optimiser.learning_rate=1", "optimiser", "did you mean 'optimizer'?"),
        ("model.blocks.mlstm.mixer.head_count=4", "model.blocks.mlstm.mixer.head_count", "num_heads"),
        ("model.blocks.mlstm.mixer.num_head=4", "model.blocks.mlstm.mixer.num_head", "did you mean 'num_heads'?"),
        ("model.blocks.mlstm.chanel.type=swiglu", "model.blocks.mlstm.chanel", "did you mean 'channel'?"),
        ("data.source.pathh=x", "data.source.pathh", "path"),
        ("train.steps=many", "train.steps", "'many': input should be a valid integer"),
        ("train.steps=2.5", "train.steps", "2.5: input should be a valid integer"),
        ("train.steps=true", "train.steps", "must be a number, but is true"),
        ("train.evaluate_every=false", "train.evaluate_every", "must be a number, but is false"),
        ("schedule.decay_steps=true", "schedule.decay_steps", "must be a number, but is true"),
        ("parallel.sequence=3", "parallel.sequence", "valid boolean"),
        ("train.steps=0", "train.steps", "0: input should be greater than or equal to 1"),
        ("train.steps=null", "train.steps", "None: input should be a valid integer"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate", "greater than 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate", "finite"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "nan: input should be"),
        ("optimizer.betas=[0.9,1.0]", "optimizer", "[0, 1)"),
        ("schedule.final_fraction=1.5", "schedule.final_fraction", "less than or equal to 1"),
        ("data.held_out_fraction=0.7", "data.held_out_fraction", "less than 0.5"),
        ("data.source.type=web", "data.source.type", "standard_library"),
        ("parallel.zero=4", "parallel.zero", "0, 1, 2 or 3"),
        ("train.precision=float16", "train.precision", "'float32' or 'bfloat16'"),
        ("run.directory=''", "run.directory", "at least 1 character"),
    ],
)
def test_wrong_value_names_its_key_and_what_was_expected(override: str, key: str, expected: str) -> None:
    message = _message(override)
    assert message.startswith(str(QUICKSTART))
    assert key in message and expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor=3", "model.vocab_size=264"], "num_heads=4 is not divisible by parallel.tensor=3"),
        (["parallel.pipeline=5"], "model.num_layers=4 is fewer than parallel.pipeline=5"),
        (["parallel.pipeline=2", "parallel.zero=2"], "zero=2 does not go with pipeline=2"),
        (["parallel.pipeline=2", "parallel.zero=3"], "zero=3 does not go with pipeline=2"),
        (["parallel.sequence=true"], "sequence=true needs tensor > 1"),
        (
            ["parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=255"],
            "data.sequence_length=255 is not divisible by parallel.tensor=2",
        ),
        (["model.blocks.mlstm.mixer.num_heads=7"], "num_heads=7 does not divide int(hidden_size * query_key_factor)"),
        (
            ["parallel.tensor=4", "model.blocks.mlstm.channel.intermediate_size=510"],
            "inner width 510 is not divisible by parallel.tensor=4",
        ),
        (
            [_hnet(64, decoder="gone")],
            "hierarchy.stages.0.decoder names the block 'gone', but blocks has only ['mlstm']",
        ),
        ([_hnet(66)], "num_heads=4 does not divide int(hidden_size * query_key_factor)"),
        ([_hnet(4096)], "stages.0.hidden_size=4096 is above model.hidden_size="),
        ([_hnet(64, 32)], "from the outermost inwards, must not shrink, but are [64, 32]"),
        ([_hnet(64, ratio=1)], "target_ratio' is 1: input should be greater than 1"),
        ([_hnet(64), "parallel.pipeline=2"], "type hnet does not go with parallel.pipeline=2"),
        ([_hnet(64), "parallel.tensor=2", "parallel.sequence=true"], "does not go with parallel.sequence=true"),
        ([_hat()], "type=hat reads where words start, but data.tokenizer.type=bytes knows no words; set"),
        ([_hat(num_heads=3), WORDS], "hierarchy: num_heads=3 does not divide hierarchy.hidden_size=64"),
        ([_hat(num_heads=1), WORDS, "parallel.tensor=2"], "num_heads=1 is not divisible by parallel.tensor=2"),
        ([_hat(), WORDS, "parallel.pipeline=2"], "type hat does not go with parallel.pipeline=2"),
        ([_hat(), WORDS, "parallel.tensor=2", "parallel.sequence=true"], "type hat does not go with parallel.sequence"),
        (["model.layers=[mlstm,mamba]"], "layers names the block 'mamba', but blocks has only ['mlstm']"),
        (["model.layers=[mlstm,mlstm,mlstm]"], "does not repeat a whole number of times in num_layers=4"),
        (["model.blocks.mlstm.mixer=null", "model.blocks.mlstm.channel=null"], "needs a mixer, a channel mixer"),
        (["train.global_batch_size=12", "train.micro_batch_size=8"], "train.global_batch_size=12 is not a multiple of"),
        (["parallel.data=3"], "x parallel.data (3)"),
        (["schedule.warmup_steps=300", "train.steps=300"], "schedule.warmup_steps=300 must be below train.steps=300"),
        (["schedule.decay_steps=280", "schedule.warmup_steps=30", "train.steps=300"], "exceeds train.steps=300"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], expected: str) -> None:
    message = _message(*overrides)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["parallel.tensor=2"], 3, "3 processes cannot hold parallel.tensor=2"),
        (["parallel.data=2"], 1, "parallel.data=2, but 1 processes over 1 ranks a model leave 1"),
        (["train.global_batch_size=16", "train.micro_batch_size=8"], 4, "train.global_batch_size=16 is not a multiple"),
    ],
)
def test_number_of_processes_that_does_not_fit(overrides: list[str], world_size: int, expected: str) -> None:
    assert expected in (check_world_size(load_config(QUICKSTART, overrides), world_size) or "")


def test_every_wrong_key_is_reported_at_once() -> None:
    message = _message("train.steps=0", "train.stepz=3", "model.hidden_size=-1")
    assert all(key in message for key in ("train.steps", "train.stepz", "model.hidden_size"))


def test_missing_key_is_named(tmp_path: Path) -> None:
    path = _file(tmp_path, f"base: {QUICKSTART}\nwandb: {{}}\n")
    raw = load_config(path).model_dump(mode="json")
    del raw["train"]["steps"], raw["run"]
    with pytest.raises(InputError, match=r"run\.yaml: 'run' is missing.*'train\.steps' is missing"):
        parse_config(raw, "run.yaml")


def test_bases_merge_in_order_and_the_file_itself_is_last(tmp_path: Path) -> None:
    _file(tmp_path, "train: {steps: 50, seed: 1}\n", "first.yaml")
    _file(tmp_path, "train: {seed: 2, micro_batch_size: 4}\n", "second.yaml")
    path = _file(tmp_path, f"base: [{QUICKSTART}, first.yaml, second.yaml]\ntrain: {{micro_batch_size: 2}}\n")
    train = load_config(path, ["train.log_every=7"]).train
    assert (train.steps, train.seed, train.micro_batch_size, train.log_every) == (50, 2, 2, 7)


def test_base_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: no such configuration file \(named under 'base' in .*run\.yaml"):
        load_config(_file(tmp_path, "base: gone.yaml\n"))


def test_bases_that_lead_back_to_themselves(tmp_path: Path) -> None:
    _file(tmp_path, "base: run.yaml\n", "other.yaml")
    with pytest.raises(InputError, match="lead back to itself"):
        load_config(_file(tmp_path, "base: other.yaml\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [", "is not valid YAML"),
        ("- a list\n", "must hold a mapping of keys to values, but holds list"),
        ("", "must hold a mapping of keys to values, but holds NoneType"),
        ("base: 3\n", "'base' must be a file name or a list of file names"),
        ("train: ${nowhere}\n", "nowhere"),
    ],
)
def test_file_that_cannot_be_read(tmp_path: Path, text: str, expected: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such configuration file"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1"])
def test_override_that_is_not_key_and_value(override: str) -> None:
    assert f"override '{override}'" in _message(override)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003"])
def test_numbers_with_exponents_are_numbers(text: str) -> None:
    assert load_config(QUICKSTART, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 3e-4


DATA_FILES = [path for path in FILES if path.parent.name == "data"]


@pytest.mark.parametrize("path", DATA_FILES, ids=_name)
def test_data_section_loads_by_itself(path: Path) -> None:
    data = load_data_config(path, ["data.held_out_fraction=0.25"])
    assert data.held_out_fraction == 0.25
    assert data.sequence_length == yaml.safe_load(path.read_text())["data"]["sequence_length"]


def test_data_section_of_a_run_is_the_runs(tmp_path: Path) -> None:
    assert load_data_config(QUICKSTART, []) == load_config(QUICKSTART).data
    path = _file(tmp_path, f"base: {QUICKSTART}\ndata: {{sequence_length: 99}}\nmodel: {{num_layers: -1}}\n")
    assert load_data_config(path, []).sequence_length == 99


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("run: {directory: x}\n", [], "'data' is missing"),
        ("dta: {}\ndata: {}\n", [], "unknown key 'dta'; did you mean 'data'?"),
        (f"base: {QUICKSTART}\n", ["dat.sequence_length=3"], "unknown key 'dat'; did you mean 'data'?"),
        (f"base: {QUICKSTART}\n", ["data.source.pathh=3"], "unknown key 'data.source.pathh'"),
        (f"base: {QUICKSTART}\n", ["data.tokeniser=3"], "unknown key 'data.tokeniser'; did you mean 'tokenizer'?"),
        (f"base: {QUICKSTART}\n", ["data.sequence_length=1"], "'data.sequence_length' is 1: input should be"),
        (f"base: {QUICKSTART}\n", ["data.source=null"], "'data': give either source or mixture"),
        (f"base: {QUICKSTART}\n", ["data"], "expected key=value"),
        (f"base: {QUICKSTART}\n", ["[=1"], "expected key=value"),
    ],
)
def test_data_section_that_is_wrong(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        load_data_config(path, overrides)
    assert "\n" not in str(caught.value)
