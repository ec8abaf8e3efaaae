"""A config file with a command line's changes to it: what can be varied, built and handed on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import FrozenConfigDict

from lsdl.config import load
from lsdl.experiment import Experiment, build


@dataclass(frozen=True)
class Source:
    """`--config=FILE[:VARIANT]` and the `--config.FIELD=VALUE` behind it."""

    file: str
    overrides: tuple[str, ...] = ()

    def varied(self, **fields: Any) -> "Source":
        """The same with other values of `fields`, which replace the command line's."""
        kept = [
            argument
            for field, argument in _pairs(self.overrides)
            if field.replace(".", "__") not in fields
        ]
        given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
        return Source(self.file, (*kept, *given))

    def load(self) -> tuple[FrozenConfigDict, dict[str, Any]]:
        """The config, and {field: value} of the command line. Raises `UserError` as `load` does."""
        return load(self.file, list(self.overrides))

    def field(self, name: str) -> Any:
        """The value of the field `name`, such as mesh."""
        return self.load()[0][name]

    def build(self, devices: Sequence | int | None = None) -> Experiment:
        """The experiment on `devices`, as `experiment.build` takes them."""
        return build(self.load()[0], devices=devices)


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field, one argument that sets it) of each; `--config.x 1` becomes `--config.x=1`."""
    arguments = iter(overrides)
    for argument in arguments:
        field, equals, _ = argument.removeprefix("--config.").partition("=")
        if not equals and not field.startswith("--"):
            value = next(arguments, None)
            argument = argument if value is None else f"{argument}={value}"
        yield field, argument
