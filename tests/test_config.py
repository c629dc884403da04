"""Options: choices are those of the tables they repeat, TOML gives the same options back, errors name the cure."""

import dataclasses
import time

import pytest

from hpcmlp import config
from hpcmlp.cli import make_parser, parse
from hpcmlp.comm import COLLECTIVES
from hpcmlp.comm.wire import WIRES
from hpcmlp.config import TrainConfig, read_toml
from hpcmlp.data.manifest import SPLITS
from hpcmlp.errors import ConfigError, UsageError, printable
from hpcmlp.nn import initializers, losses, optimizers, schedules
from hpcmlp.ops.activations import KINDS as ACTIVATIONS


@pytest.mark.parametrize("choices, table", [
    (config.ACTIVATIONS, ACTIVATIONS), (config.LOSSES, losses.OPTIONS), (config.OPTIMIZERS, optimizers.RULES),
    (config.SCHEDULES, schedules.DEFAULTS), (config.INITIALIZERS, initializers.KINDS),
    (config.SYNCS, ("auto", *COLLECTIVES, "nccl", "direct", "server")), (config.SPLITS, SPLITS)])
def test_choices_are_those_of_the_table_behind_them(choices, table):
    assert sorted(choices) == sorted(table)


def test_the_wires_of_the_option_are_those_of_the_ring():
    field = {f.name: f for f in dataclasses.fields(config.TrainConfig)}["wire"]
    assert sorted(field.metadata["choices"]) == sorted(WIRES)


@pytest.mark.parametrize("options", [
    [], ["--hidden", "none", "--no-test", "--ema", "0.5"], ["--quantiles", "0.2,0.8", "--class-weights", "1,2"],
    ["--data", 'a "quoted" \\ name \u00e4']])
def test_resolved_options_read_back_from_toml_are_the_same(tmp_path, options):
    _, first = parse(["train", "--data", "d", "--out", "r", *options])
    (tmp_path / "c.toml").write_text(config.to_toml(first))
    _, second = parse(["train", "--config", str(tmp_path / "c.toml")])
    assert first == second


def test_every_option_of_every_program_is_in_its_help():
    programs = make_parser()._subparsers._group_actions[0].choices
    assert set(programs) == set(config.CONFIGS)
    for name, kind in config.CONFIGS.items():
        text = programs[name].format_help()
        for field in dataclasses.fields(kind):
            shown = field.name if field.metadata["positional"] else config.flag(field.name)
            assert field.metadata["help"] and (shown in text or field.metadata["metavar"] in text), (name, field.name)


@pytest.mark.parametrize("arguments, error, words", [
    (["train"], ConfigError, "--data, --out must be given"), (["trian"], UsageError, "invalid choice"),
    (["train", "--seed", "1_0"], UsageError, "not a whole number"),
    (["train", "--lr", "nan"], ConfigError, "not finite"),
    (["train", "--epoch", "3"], UsageError, "did you mean '--epochs'"), ([], UsageError, "PROGRAM")])
def test_wrong_command_lines_say_what_is_wrong(arguments, error, words):
    with pytest.raises(error, match=words):
        parse(arguments)


@pytest.mark.parametrize("text, words", [
    ("lr = 0x" + "f" * 5000, "a whole number of 20000 bits"), ("epochs = 0x" + "f" * 5000, "a whole number of 20000"),
    ("lr = " + "9" * 400, "a whole number of 1329 bits"),
    (".".join("a" * 30_000) + " = 1", "a key of more than 100 parts"),
    ("[" + ".".join("a" * 30_000) + "]", "a key of more than 100 parts"),
    ("lr = " + "[" * 150 + "]" * 150, "is a list"), ("lr = " + "[" * 20_000 + "]" * 20_000, "not a TOML file"),
    ("lr = [" + "1," * 30_000 + "]", "is a list"), ('schedule = "' + "x" * 60_000 + '"', "not known"),
    ("x" * 70_000, "at most 65536 bytes")])
def test_an_absurd_toml_file_is_one_short_sentence_at_once(tmp_path, text, words):
    (tmp_path / "a.toml").write_text(text)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=words) as error:
        read_toml(str(tmp_path / "a.toml"), TrainConfig)
    assert len(printable(str(error.value))) <= 1500 and time.process_time() - begin < 2
