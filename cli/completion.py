"""Completion by the shell: its script, and what it asks for while somebody types.

A script names this very copy of farmhand, and asks it alone: whoever is in a directory with another
``invoke`` starts nothing there with the tabulator key."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.known_names import beginnings, known_names
from cli.task_words import TaskWords, task_words
from cli.typed_words import context_of, farm_in
from host.program import CHECKOUT, ROOT
from inventory.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from invoke.collection import Collection
    from invoke.parser.argument import Argument
    from invoke.parser.context import ParserContext

_BASH = """\
# Completion of {path} for bash: source this, as in ~/.bashrc.
_{name}_complete() {{
    local typed=$1
    [[ $typed == '~/'* ]] && typed=$HOME/${{typed#'~/'}}
    [[ $typed == */* ]] || typed=$(type -P -- "$typed")
    COMPREPLY=()
    [[ $typed -ef {path} ]] || return
    mapfile -t COMPREPLY < <({path} --complete -- "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null)
    COMPREPLY=("${{COMPREPLY[@]%%$'\\t'*}}")
    [[ ${{COMPREPLY[0]-}} != *[:@] ]] || compopt -o nospace
}}
complete -o default -F _{name}_complete {name}
"""
_ZSH = """\
# Completion of {path} for zsh: source this, as in ~/.zshrc.
_{name}_complete() {{
    local typed=${{~words[1]}} line
    local -a names texts
    [[ $typed == */* ]] || typed=${{commands[$typed]}}
    if [[ $typed -ef {path} ]]; then
        for line in "${{(@f)$({path} --complete -- "${{(@Q)words[2,CURRENT]}}" 2>/dev/null)}}"; do
            [[ -n $line ]] || continue
            names+=("${{line%%$'\\t'*}}")
            texts+=("${{line/$'\\t'/  -- }}")
        done
    fi
    local -a more
    [[ $names[1] == *[:@] ]] && more=(-S '')
    (( $#names )) && compadd -l -d texts "$more[@]" -a names || _files
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef _{name}_complete {name}
"""
_FISH = """\
# Completion of {path} for fish: put this into ~/.config/fish/completions/{name}.fish
function __{name}_complete
    set -l words (commandline --tokenize --cut-at-cursor --current-process)
    set -l typed (string replace --regex '^~/' "$HOME/" -- $words[1])
    string match --quiet '*/*' -- $typed; or set typed (command --search -- $typed)
    set -l found
    if test (realpath -- $typed) = (realpath -- {path})
        set -a words (commandline --current-token --cut-at-cursor)
        set found ({path} --complete -- $words[2..-1] 2>/dev/null)
    end
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline --current-token)
    end
end
complete --command {name} --no-files --arguments '(__{name}_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """For this shell. UsageError for one that there is none for."""
    if shell not in _SCRIPTS:
        known = ", ".join(_SCRIPTS)
        raise UsageError(
            f"--print-completion-script: there is none for {shell!r}",
            remedy=did_you_mean(shell, _SCRIPTS, f"there is one for {known}"),
        )
    path = ROOT / "invoke" if CHECKOUT else Path(sys.argv[0]).absolute()
    return _SCRIPTS[shell].format(name=path.name, path=shlex.quote(str(path)))


def candidates(tasks: Collection, core: ParserContext, words: Sequence[str]) -> list[str]:
    """What the last word can become, given those before it: each with what it is after a tabulator. None
    where it is for a file's name."""
    *before, word = words or [""]
    if word == "=":  # bash makes three words of --vm=prod
        word = ""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    found = _found(tasks, core, [*before, flag] if equals else before, value if equals else word)
    beginning = f"{flag}=" if equals else ""
    return [
        f"{beginning}{name}\t{text}" if text else f"{beginning}{name}"
        for name, text in found
        if name.startswith(value if equals else word)
    ]


def _found(
    tasks: Collection, core: ParserContext, before: Sequence[str], word: str
) -> Iterator[tuple[str, str]]:
    if "--" in before:
        return
    task, wanted = _where(tasks, core, before)
    if wanted is not None:
        asked = (task, wanted.names[0], farm_in(before))
        for name in known_names(*asked) or beginnings(*asked):
            yield name, ""
        return
    context = context_of(tasks, task) if task else core
    if word.startswith("-"):
        yield from _flags(context, before)
        return
    if not task:
        for name in sorted(tasks.task_names):
            yield name, (tasks[name].__doc__ or "").partition("\n")[0]
        return
    bare = task_words.get(task, TaskWords()).bare
    names = known_names(task, bare, farm_in(before)) if bare else ()
    found = [name for name in names or () if name not in before]
    if bare and (begin := beginnings(task, bare, farm_in(before))):
        if any(name.startswith(one) for name in before for one in begin):
            return  # cp: the other one is a file here
        found += begin
    for name in found:
        yield name, ""
    if not found and not word:
        yield from _flags(context, before)


def _flags(context: ParserContext, before: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Those that may be typed now."""
    for argument in context.args.values():
        flag = f"--{argument.names[0]}"
        inverse = [other for other, of in context.inverse_flags.items() if of == flag]
        if argument.kind is list or not {flag, *inverse} & {*before}:
            for name in (flag, *inverse):
                yield name, argument.help or ""


def _where(tasks: Collection, core: ParserContext, before: Sequence[str]) -> tuple[str, Argument | None]:
    """The task whose words these are, "" for none yet, and the flag whose value comes next."""
    task, context = "", core
    wanted: Argument | None = None
    for word in before:
        if word == "=":
            continue
        if wanted is not None:
            wanted = None
        elif word.startswith("-"):
            argument = context.flags.get(word) or core.flags.get(word)
            takes = argument is not None and argument.takes_value and not argument.optional
            wanted = argument if takes else None
        elif not task and word in tasks.task_names:
            task, context = word, context_of(tasks, word)
    return task, wanted
