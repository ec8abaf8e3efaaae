"""Sampling from a language model, and the entry that prints it."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest

from lsdl.generate import main
from lsdl.sampling import sample

VOCAB, PADDED, LENGTH = 5, 8, 4


def chain(variables, token_BL, *, train):
    """A model whose next token is this one plus 1, by a margin of `variables` nats."""
    assert not train
    table_VD = jnp.eye(PADDED)
    hidden_BLD = variables * jnp.eye(PADDED)[(token_BL + 1) % VOCAB]
    return hidden_BLD.at[..., VOCAB:].set(1e9), table_VD  # padding would win if it could


def draw(margin, prompt, **options):
    given = dict(num_tokens=9, temperature=1.0, top_k=0, key=jax.random.key(0)) | options
    return list(
        sample(chain, jnp.float32(margin), prompt, max_length=LENGTH, vocab_size=VOCAB, **given)
    )


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}], ids=str)
def test_the_most_probable_token_each_time_also_beyond_the_window(options):
    assert draw(1.0, [3], **options) == [4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert draw(1.0, [0, 1, 2, 3, 4, 0, 1], **options)[:3] == [2, 3, 4]


def test_a_sample_follows_the_distribution_and_the_key():
    first = draw(0.0, [0], num_tokens=300)
    assert first == draw(0.0, [0], num_tokens=300)
    assert first != draw(0.0, [0], num_tokens=300, key=jax.random.key(1))
    counts = [first.count(token) for token in range(VOCAB)]
    assert sum(counts) == 300  # never a padded row
    assert min(counts) > 30
    assert max(counts) < 90


def test_temperature_and_top_k_narrow_the_distribution():
    steps = lambda tokens: [(b - a) % VOCAB for a, b in pairwise(tokens)]  # noqa: E731
    share = lambda **options: steps(draw(1.0, [0], num_tokens=200, **options)).count(1) / 199  # noqa: E731
    assert 0.25 < share() < 0.55  # e / (e + 4) = 0.40
    assert share(temperature=0.2) > 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from lsdl.train import main as train
    from tests.conftest import CONFIGS

    folder = tmp_path_factory.mktemp("runs") / "gpt"
    config = f"{CONFIGS / 'stdlib_gpt.py'}:smoke"
    short = ("--config.total_steps=3", "--config.model.num_layers=1")
    assert train(["--config", config, "--workdir", str(folder), *short]) == 0
    return folder


def test_the_entry_goes_on_with_the_prompt(run, capsys):
    arguments = ["--run", str(run), "--prompt", "def ", "--tokens", "20"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ")
    assert len(first) > 10
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "nowhere"], "no config.json"),
        (["--run", "RUN", "--tokens", "0"], "--tokens=0 must be at least 1"),
        (["--run", "RUN", "--temperature", "-1"], "--temperature=-1.0 must be at least 0"),
        (["--run", "RUN", "--temperature", "nan"], "--temperature=nan must be at least 0"),
        (["--run", "RUN", "--top-k", "-2"], "--top-k=-2 must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, arguments, sentence):
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
