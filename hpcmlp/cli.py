"""The command line: one subcommand per program; the only reader of sys.argv."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, NoReturn

import hpcmlp
from hpcmlp import launch
from hpcmlp.config import CONFIGS, build, check_value, nearest
from hpcmlp.errors import HpcmlpError, Unavailable, UsageError, flag, of_system, printable

EPILOG = """exit codes: 0 done, 2 wrong usage, 65 bad data, 66 no such input, 69 something needed is missing, 70 the run
cannot go on, 73 cannot write, 75 stopped early and saved (run again with --resume), 78 wrong configuration or launch"""


ALONE = ("plan", "launch")   # programs that start no MPI: under a launcher the first rank alone runs them


class _Alone:
    """The world of a program without MPI."""

    comm, rank, size = None, 0, 1


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see '{self.prog} --help'.")


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal; argparse's own way to find the width imports eight modules on every rank."""

    def __init__(self, prog: str):
        try:
            width = os.get_terminal_size().columns
        except OSError:
            width = 100
        super().__init__(prog, width=max(60, width - 2))


def make_parser(program: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of `program`, or of all programs, made from the option dataclasses. Local."""
    parser = _Parser(prog="hpcmlp", description=hpcmlp.__doc__, epilog=EPILOG, allow_abbrev=False,
                     formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"hpcmlp {hpcmlp.__version__}")
    programs = parser.add_subparsers(dest="program", metavar="PROGRAM", required=True, parser_class=_Parser)
    # Each parser looks for translations in a dozen places: with thousands of ranks, one program's must do.
    for name in CONFIGS if program not in CONFIGS else [program]:
        config = CONFIGS[name]
        summary = config.__doc__.strip()
        sub = programs.add_parser(name, help=summary, description=summary, epilog=EPILOG, allow_abbrev=False,
                                  argument_default=argparse.SUPPRESS, formatter_class=_Formatter)
        if not any(f.metadata["positional"] for f in fields(config)):
            sub.add_argument("-c", "--config", metavar="FILE.toml", help="read options from a TOML file; the command "
                             "line wins")
        for f in fields(config):
            _add_option(sub, f)
    return parser


def _add_option(parser: argparse.ArgumentParser, f: Any) -> None:
    meta = f.metadata
    text = meta["help"] + _default_text(f)
    metavar = meta["metavar"] or ("|".join(meta["choices"]) if meta["choices"] else
                                  {int: "N", float: "X", str: "TEXT"}.get(meta["kind"], None))
    if meta["positional"]:
        parser.add_argument(f.name, help=text, metavar=meta["metavar"] or f.name.upper(),
                            **({"nargs": "+"} if meta["many"] else {} if f.default is MISSING else {"nargs": "?"}))
    elif meta["kind"] is bool:
        parser.add_argument(flag(f.name), help=text, action=argparse.BooleanOptionalAction)
    else:
        short = [f"-{meta['short']}"] if meta["short"] else []
        parser.add_argument(*short, flag(f.name), help=text, metavar=metavar)


def _default_text(f: Any) -> str:
    if f.default is MISSING or f.default is None or f.metadata["kind"] is bool:
        return " (default: on)" if f.default is True else ""
    shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    return f" (default: {shown})"


def _parse_one(kind: type, text: str, where: str) -> Any:
    if kind is str:
        return text
    try:
        return kind(text) if "_" not in text else kind("not a number")
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"{where} {text!r} is not {wanted}.") from None


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Return (program, its configuration) for the arguments `argv`.

    Local. Raises UsageError for a wrong command line, ConfigError for a wrong value or TOML file.
    """
    # argparse looks up translations of its words in four files each, on every rank; there are none of ours.
    os.environ.setdefault("LANGUAGE", "C")
    parser = make_parser(argv[0] if argv else None)
    known, unknown = parser.parse_known_args(argv)
    config = CONFIGS[known.program]
    if unknown:
        word = unknown[0].split("=")[0]
        legal = [flag(f.name) for f in fields(config)] + ["--config", "--help"]
        hint = nearest(word, legal) or "."
        raise UsageError(f"Unknown option or argument {unknown[0]!r} for 'hpcmlp {known.program}'{hint}")
    given = vars(known)
    program, toml = given.pop("program"), given.pop("config", None)
    for f in fields(config):
        if f.name in given:
            given[f.name] = _read_value(f, given[f.name])
    return program, build(config, given, toml)


def _read_value(f: Any, value: Any) -> Any:
    meta, where = f.metadata, flag(f.name)
    if meta["many"]:
        words = value if isinstance(value, list) else [w.strip() for w in value.split(",")]
        words = [] if words in (["none"], [""]) else words
        return check_value(where, meta, [_parse_one(meta["kind"], w, where) for w in words])
    if meta["kind"] is bool:
        return value
    return check_value(where, meta, _parse_one(meta["kind"], value, where))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one program on all ranks of this launch and return the exit code.

    Collective over the world, but for --help, wrong usage and the programs of ALONE, which start no MPI.
    """
    program = config = None
    try:
        program, config = parse(sys.argv[1:] if argv is None else argv)
        if program in ALONE:
            return 0 if launch.launcher_rank() else _run(program, config, _Alone())
        world = launch.open_world()
    except Unavailable as error:
        launch.end_unstarted(error.code, _say, error)
    except HpcmlpError as error:
        if launch.launcher_rank() == 0:
            if program != "doctor" or not _look_alone(config, error):
                _say(error)
        else:
            # A launcher that ends the job with its first rank to fail would else cut rank 0's sentence off.
            time.sleep(0.5)
        return error.code
    return _run(program, config, world)


def _look_alone(config: Any, error: HpcmlpError) -> bool:
    """Let `doctor` show what one process can see of a launch that failed; return whether it could."""
    try:
        from hpcmlp.programs.doctor import unstarted
    except (ImportError, RuntimeError):     # there is no MPI library at all, as the sentence has said
        return False
    unstarted(config, error)
    return True


def _run(program: str, config: Any, world: Any) -> int:
    """Run the program; whatever it raises on one rank ends the job on all of them."""
    try:
        module = import_module(f"hpcmlp.programs.{program}")
        code = module.main(config, world.comm)
        sys.stdout.flush()
        return code
    except HpcmlpError as error:
        if error.agreed or world.size == 1:
            if world.rank == 0:
                _say(error)
            return error.code
        _say(error, f"rank {world.rank}: ")
        launch.end_all(world.comm, error.code)
    except BrokenPipeError:
        # Nobody reads our output any more. Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        launch.end_all(world.comm, 141)
    except KeyboardInterrupt:
        launch.end_all(world.comm, 130)
    except MemoryError as error:
        _say(Unavailable(f"out of memory ({error or 'no further detail'}); use more ranks, --memory-limit or "
                         "--accumulate."), f"rank {world.rank}: ")
        launch.end_all(world.comm, Unavailable.code)
    except OSError as error:
        told = of_system(error)
        if told is None:
            _say_fault(world)
        _say(told, f"rank {world.rank}: ")
        launch.end_all(world.comm, told.code)
    except Exception:
        _say_fault(world)
    return HpcmlpError.code


def _say(error: HpcmlpError, who: str = "") -> None:
    print(f"hpcmlp: {who}{printable(str(error))}", file=sys.stderr, flush=True)


def _say_fault(world: Any) -> None:
    """Print the traceback of our own fault, from the rank that has it, and end the job."""
    import traceback  # only for a fault: every rank pays for what stands above
    lines = traceback.format_exc()
    print(f"[rank {world.rank} {os.uname().nodename}] this is a fault of hpcmlp, not of its input:\n{lines}",
          file=sys.stderr, flush=True)
    launch.end_all(world.comm, HpcmlpError.code)
