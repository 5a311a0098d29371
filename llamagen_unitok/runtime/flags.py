"""Command lines: flags from dataclasses, and one way for every script to end.

Exit codes: 0 success, 2 wrong input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from llamagen_unitok.runtime.errors import ToldByMain

Settings = TypeVar("Settings")

WRONG_INPUT = 2
INTERRUPTED = 130
PIPE_CLOSED = 141  # what a shell reports for a process that nobody reads from any more
TELLING_SEC = 1.0

_METAVARS = {int: "N", float: "X", Path: "DIR"}


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, and whose help fits a screen.

    usual: destinations of the flags that --help tells of, where all would not fit; --help-all tells of all then.
    """

    def __init__(self, description: str, *, usual: Collection[str] | None = None, **options: Any):
        super().__init__(description=description, formatter_class=_compact_help, allow_abbrev=False, **options)
        self.usual = usual
        if usual is not None:
            self.add_argument("--help-all", dest="help", action=_HelpAll, nargs=0, help="tell of all flags and exit")

    def format_help(self) -> str:
        hidden = {} if self.usual is None else {a: a.help for a in self._actions if a.dest not in {*self.usual, "help"}}
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in hidden.items():
                action.help = text

    def error(self, message: str) -> NoReturn:
        self.exit(
            WRONG_INPUT,
            f"{self.prog}: {message} ({'--help' if self.usual is None else '--help-all'} lists the flags)\n",
        )


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.usual = None
        parser.print_help()
        parser.exit()


def _compact_help(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118)


def add_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type, *, rename: dict[str, str] | None = None
) -> None:
    """One flag per field of a dataclass: its name with dashes, its type, default and metadata.

    Metadata: `help`; `flag`, with its dashes, where it is not the field's name; `choices`; `metavar`, where it is
    neither the choices nor that of its type.
    rename: field → flag name without dashes, for a command that calls it something else.
    A field without default is a required flag; a bool field is a pair --name / --no-name.
    """
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        flag = field.metadata.get("flag", f"--{field.name}")
        if rename and field.name in rename:
            flag = f"--{rename[field.name]}"
        kind, required = _plain_type(kinds[field.name]), field.default is dataclasses.MISSING
        text = field.metadata.get("help", "").replace("%", "%%")
        options: dict[str, Any] = {"dest": field.name, "required": required}
        if not required:
            options["default"] = field.default
            if field.default is not None and kind is not bool:
                text += f" (default {field.default})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            choices = field.metadata.get("choices")
            options["choices"] = choices
            usual = "|".join(choices) if choices else _METAVARS.get(kind, "NAME")
            options["metavar"] = field.metadata.get("metavar", usual)
        parser.add_argument(flag.replace("_", "-"), help=text, **options)


def add_run_flags(parser: argparse.ArgumentParser, *, out_required: bool = True) -> None:
    """The flags that every training script has: where the run lives, what it goes on from, and on what it runs."""
    parser.add_argument("--out", type=Path, required=out_required, metavar="DIR", help="where the run lives")
    parser.add_argument("--resume", default="auto", help="auto (go on where OUT stopped), none, or a checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def settings_from(settings: type[Settings], flags: argparse.Namespace) -> Settings:
    """The dataclass with the values of its flags; its own checks raise ValueError."""
    return settings(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(settings)})


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values of one kind with commas between them, such as ``1,1.5,2``."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            what = {float: "numbers", int: "whole numbers"}.get(kind, "values")
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what} with commas between them") from None

    return parse


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """The destinations of the flags that a command line names, whatever their values."""
    written = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    return {action.dest for action in parser._actions if written & set(action.option_strings)}


def _plain_type(kind: Any) -> type:
    """int for ``int | None``; other types as they are."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def run_cli(body: Callable[[], None]) -> int:
    """Run a script's body and return its exit code; what the user caused ends in one line on stderr, no traceback.

    That is ValueError, OSError (paths, disks) and FloatingPointError (a run that diverged).
    """
    try:
        body()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # As in `… --list-classes | head`: not an error. What is left in the buffer must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ToldByMain:
        # torchrun ends all processes as soon as one has ended, and the main one must get to its line.
        time.sleep(TELLING_SEC)
        return WRONG_INPUT
    except (ValueError, OSError, FloatingPointError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return WRONG_INPUT
    return 0
