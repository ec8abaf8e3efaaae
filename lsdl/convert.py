"""Convert: `python -m lsdl.convert`: Hugging Face's weights to lsdl's, and back."""

import argparse
import os
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.convert --config configs/lm_gpt2.py:124m --from gpt2/ --out weights/gpt2
  python -m lsdl.train --config configs/lm_gpt2.py:124m --config.init_from=weights/gpt2
  python -m lsdl.convert --run runs/lm_gpt2 --out hf/gpt2
  python -m lsdl.convert --config configs/imagenet_vit.py:b16 --from vit/model.safetensors \\
      --out weights/vit

The first reads a safetensors file, or a folder with one or several, as transformers saves it (lsdl
downloads nothing). The config says which model it is: every tensor has to have its place in it, and
its sizes have to be those of the folder's config.json. With --run the newest checkpoint of a run or
converted weights become what transformers' from_pretrained reads (docs/howto/finetune.md).
exit codes: 0 done, 2 bad input, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.convert",
        description="Weights of Hugging Face's models to lsdl's, or with --run the other way.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:VARIANT]", help="the config of the model that --from is of")
    add("--from", dest="source", type=Path, metavar="PATH", help="a safetensors file or folder")
    add("--run", type=Path, metavar="DIR", help="a run folder or converted weights")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parser().parse_known_args(argv)
    try:
        return convert(arguments, overrides)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def convert(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Convert what the command line names; returns the exit code."""
    run, given = arguments.run, (arguments.config, arguments.source)
    if any(given) or overrides if run else not all(given):
        raise UserError("Give --config and --from to read Hugging Face's weights, or --run alone.")
    out = arguments.out.expanduser().absolute()
    if out.exists():
        raise UserError(f"--out={arguments.out} exists: name a folder that does not.")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out={arguments.out} cannot be created: {parent} cannot be written to.")
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import config as configs
    from lsdl import weights as files
    from lsdl.checkpoint import save_weights
    from lsdl.experiment import reopen, stored_weights
    from lsdl.models import convert as tables
    from lsdl.rundir import RunDir

    if run:
        folder = RunDir(run.expanduser())
        stored = folder.read_config()
        if stored is None or not folder.checkpoints.is_dir():
            raise UserError(f"--run={run} is no run folder with config.json and checkpoints.")
        fields = stored["config"]
        if fields.get("data.tokenizer") != "bytes":
            fields = fields | {"data.tokenizer": ""}  # weights need none, and the file may be gone
        experiment = reopen(fields)
        module, abstract = _model(experiment)
        settings = tables.fields(module, abstract)
        tensors = tables.to_hf(stored_weights(experiment, folder.checkpoints), module)
        files.write(out, tensors, settings)
    else:
        config, overridden = configs.load(arguments.config, overrides)
        fields = configs.to_json(config)
        tensors, settings = files.read(arguments.source.expanduser())
        module, abstract = _model(reopen(fields))
        tables.check_fields(settings, module, abstract)
        weights = tables.to_lsdl(tensors, module, abstract)
        folder = RunDir(out)
        out.mkdir(parents=True)
        folder.write_config(
            source=arguments.config, overrides=overridden, fields=fields, changes={}
        )
        save_weights(folder.checkpoints, weights)
    print(f"{sum(t.size for t in tensors.values()):,} numbers in {len(tensors)} tensors: {out}")
    return FINISHED


def _model(experiment):
    """The module of a stored config and the shapes of its weights."""
    from lsdl.step import as_weights, variables_of

    return experiment.module, as_weights(variables_of(experiment.abstract_state))


if __name__ == "__main__":
    start(main)
