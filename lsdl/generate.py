"""Generate: `python -m lsdl.generate --run RUN --prompt TEXT`: a sample of a language model."""

import argparse
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.generate --run runs/stdlib_gpt --prompt 'def '
  python -m lsdl.generate --run runs/stdlib_gpt --prompt 'import ' --tokens 300 --temperature 0
  python -m lsdl.generate --run runs/stdlib_gpt --prompt 'class ' --top-k 20 --seed 7

The run's folder is all that it needs: config, newest checkpoint, and the tokenizer's copy.
exit codes: 0 done, 2 bad input, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.generate",
        description="Go on with a text, by the newest checkpoint of a run with task=language.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="the run folder")
    add("--prompt", default="", metavar="TEXT", help="what the sample begins with")
    add("--tokens", type=int, default=200, metavar="N", help="how many to draw (default: 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the most probable "
        "token (default: 0.8)")  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    add("--seed", type=int, default=0, metavar="N", help="another one, another sample")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return generate(arguments)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


def generate(arguments: argparse.Namespace) -> int:
    """Print the prompt and what follows it; returns the exit code."""
    for flag, least in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not getattr(arguments, flag) >= least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}={getattr(arguments, flag)} must be at least {least}.")
    # After the parser, so that --help and a mistyped flag cost no second.
    import jax

    from lsdl import compile_cache
    from lsdl import config as configs
    from lsdl.data import text
    from lsdl.experiment import reopen, stored_weights
    from lsdl.rundir import RunDir
    from lsdl.sampling import sample

    folder = RunDir(arguments.run)
    stored = folder.read_config()
    if stored is None:
        raise UserError(f"--run={arguments.run} is no run folder: it has no config.json.")
    config = configs.from_json(stored["config"])
    if config.task != "language":
        raise UserError(f"{folder.path} is of task={config.task}: only language models generate.")
    if config.data.seq_len < 1:
        raise UserError(f"{folder.path} learned from {config.data.source}, which is no text.")
    name = folder.own_tokenizer(config.data.tokenizer)
    compile_cache.use()
    experiment = reopen(stored["config"] | {"data.tokenizer": name})
    variables = stored_weights(experiment, folder.checkpoints)

    tokenizer = text.tokenizer(name)
    prompt = [tokenizer.separator, *tokenizer.encode(arguments.prompt)]
    drawn = sample(
        experiment.module.apply,
        {"params": variables["params"], **variables["model_state"]},
        prompt,
        num_tokens=arguments.tokens,
        max_length=config.model.max_length,
        vocab_size=tokenizer.vocab_size,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        key=jax.random.key(arguments.seed),
    )
    tokens, shown = prompt[1:], ""
    print(arguments.prompt, end="", flush=True)
    shown = tokenizer.decode(tokens)
    for token in drawn:
        if token == tokenizer.separator:  # the document ends here
            break
        tokens.append(token)
        text_now = tokenizer.decode(tokens)
        if not text_now.endswith("\N{REPLACEMENT CHARACTER}"):  # a character still incomplete
            print(text_now[len(shown) :], end="", flush=True)
            shown = text_now
    print()
    return FINISHED


if __name__ == "__main__":
    start(main)
