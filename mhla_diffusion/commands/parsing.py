"""A function's parameters as options of the command line."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import auto_cli

from ..help import HelpParser, plain_message
from .end import CommandError

# Options that a message names.
_FEW = 10


def parse_and_call(function: Callable[..., Any], arguments: Sequence[str], prog: str) -> Any:
    """Call a function with what the command line gives for its parameters, and return what it returns.

    Args:
        function: with types, and a docstring in Google's style that says what each parameter is.
        arguments: of the command line.
        prog: what the user typed before them, for ``--help``.

    Raises:
        CommandError: when they are not the function's, with code 2.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return auto_cli(
        function,
        args=list(arguments),
        as_positional=False,
        allow_abbrev=False,
        prog=prog,
        parser_class=_Parser,
    )


def with_list(arguments: Sequence[str], option: str) -> list[str]:
    """Return ``A B --out D C`` as ``--option [A, B, C] --out D``: every other option has one value."""
    words, rest = list[str](), list[str]()
    remaining = iter(arguments)
    for word in remaining:
        if not word.startswith("-"):
            words.append(word)
            continue
        rest.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            rest += [value for value in [next(remaining, None)] if value is not None]
    return [*([f"--{option}", str(words)] if words else []), *rest]


def join_prompts(arguments: Sequence[str]) -> list[str]:
    """Put one list in place of all ``--prompts``: the option may be repeated, and no text is taken apart."""
    rest: list[str] = []
    prompts: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("--prompts="):
            prompts.append(argument.removeprefix("--prompts="))
        elif argument == "--prompts" and (text := next(remaining, None)) is not None:
            prompts.append(text)
        else:
            rest.append(argument)
    return [*rest, f"--prompts={json.dumps(prompts, ensure_ascii=False)}"] if prompts else rest


class _Parser(HelpParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong, where argparse prints all options before it and exits."""
        end, options, known = f"see {self.prog} --help", list[str](), ""
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            options = [option for option in options if option != "--help"]  # close to all that is short
        elif unknown := re.search(r"(?:Group '(.+)' does not accept o|O)ption '(.+)'", message):  # of a file
            group = f"{unknown[1]}." if unknown[1] else ""
            below = [a.dest.removeprefix(group) for a in self._actions if a.dest.startswith(group)]
            options = [name for name in below if "." not in name and name != "help"]
            known = f" Known there: {', '.join(options)};" if len(options) <= _FEW else ""
        close = difflib.get_close_matches(unknown[unknown.lastindex or 0], options, n=1) if unknown else []
        hint = f", did you mean {close[0]}?" if close else "." if known else ";"
        raise CommandError(f"{plain_message(message)}{hint}{known} {end}", code=2) from ex
