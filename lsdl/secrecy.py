"""What looks like a password or a key: kept out of records, and of messages.

By its shape alone: a secret that looks like any other word is not recognised. Secrets belong into
environment variables, of which lsdl records none, or into files.
"""

import re

HIDDEN = "[hidden]"
# Keys of services by their own beginnings, tokens of three parts, keys in armour.
SHAPES = re.compile(
    r"""
    \b(?:hf|gh[opsur]|npm)_[A-Za-z0-9]{20,}
    | \b(?:glpat|pypi|sk|xox[abeoprs])-[A-Za-z0-9_-]{16,}
    | \b(?:github_pat|dckr_pat|[rs]k_live|[rs]k_test|dop_v1|shpat)_[A-Za-z0-9_]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \bAIza[A-Za-z0-9_-]{30,}
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----(?:.|\n)*
    """,
    re.VERBOSE,
)
# scheme://user:password@host
USER = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
# password=..., --api-key=..., WANDB_API_KEY: ..., as whole words of the name.
NAMED = re.compile(
    r"""(?ix)
    (?<![A-Za-z0-9])
    ((?:[A-Za-z0-9]+[._-])* (?:pass(?:word|wd|phrase)?|secret|token|credentials?|auth(?:orization)?
      |bearer|api[._-]?key|access[._-]?key|private[._-]?key|signature) ["']? \s* [=:] \s* ["']?)
    ([^\s"',]+)
    """
)


def hidden(text: str) -> str:
    """`text` without what looks like a secret in it."""
    text = USER.sub(HIDDEN, SHAPES.sub(HIDDEN, text))
    return NAMED.sub(lambda found: f"{found[1]}{HIDDEN}", text)


def holds_secret(text: str) -> bool:
    """Whether `hidden` would hide anything of it."""
    return hidden(text) != text


def hidden_command(words: list[str]) -> list[str]:
    """A command line without its secrets, also where flag and value are two words."""
    shown, behind = [], False
    for word in words:
        flag = word.startswith("-") and "=" not in word
        shown.append(HIDDEN if behind and not word.startswith("-") else hidden(word))
        behind = flag and NAMED.search(f"{word}=x") is not None
    return shown
