"""Zero-shot classification, nearest neighbours and linear probes, against brute force."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from lsdl import evaluators, loop
from lsdl.data.captions import DIGIT_NAMES
from lsdl.errors import UserError
from lsdl.experiment import build
from lsdl.metrics import read_rows
from tests.curves import drawn_state
from tests.tiny import jit

CLASSES = 4


def normal(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def clusters(count, *, seed, spread=1.5):
    """Features around one centre for each class, and the classes."""
    label = np.random.default_rng(seed).integers(CLASSES, size=count)
    return normal(CLASSES, 6, seed=99)[label] + spread * normal(count, 6, seed=seed), label


class Loader:
    """Batches of features and labels, the last one filled with rows of weight 0."""

    def __init__(self, x, label, size=8):
        missing = -len(x) % size
        self.num_batches = (len(x) + missing) // size
        weight = np.pad(np.ones(len(x)), (0, missing))
        # The filling would be classified wrongly: by a label of its own, and far off.
        x = np.pad(x, ((0, missing), (0, 0)), constant_values=1e3)
        label = np.pad(label, (0, missing), constant_values=CLASSES - 1)
        leaves = {"image": x, "label": label, "weight": weight}
        self._batches = [
            {name: jnp.asarray(leaf[i : i + size]) for name, leaf in leaves.items()}
            for i in range(0, len(x), size)
        ]

    def batches(self, start, stop):
        return self._batches[start:stop]


# --- zero-shot ------------------------------------------------------------------------------------


def embed(variables, x, *, train, method):
    """A text's embedding is a table's row."""
    assert not train
    assert method == "encode_text"
    return variables["table"][x[:, 0]]


def encode(variables, batch):
    """An image's embedding is a projection."""
    return batch["image"] @ variables["projection"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


VARIABLES = {"table": unit(normal(12, 5)), "projection": normal(6, 5)}
PROMPTS = np.arange(12).reshape(CLASSES, 3, 1)


def test_class_features_are_the_mean_of_the_prompts_of_unit_length():
    make = evaluators.make_class_features(embed, lambda state: state, PROMPTS)
    expected = VARIABLES["table"].reshape(CLASSES, 3, 5).mean(1)
    np.testing.assert_allclose(make(VARIABLES), unit(expected), rtol=1e-5)


def test_zero_shot_picks_the_nearest_class_name():
    x, label = clusters(21, seed=1)
    classes = evaluators.make_class_features(embed, lambda state: state, PROMPTS)
    step = evaluators.make_zero_shot_step(encode, lambda state: state)
    evaluate = evaluators.ZeroShot(classes, step)
    found = evaluate(VARIABLES, {"valid": Loader(x, label)}.get, "valid")
    similar = x @ VARIABLES["projection"] @ np.array(classes(VARIABLES)).T
    expected = (similar.argmax(1) == label).mean()
    assert found == {"zero_shot_accuracy": pytest.approx(expected, abs=1e-9)}
    nearest = Loader(x, similar.argmax(1))
    assert evaluate(VARIABLES, {"test": nearest}.get, "test") == {"zero_shot_accuracy": 1.0}


# --- probes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_nearest_neighbours_vote_by_their_cosine(k, temperature):
    """Wu et al. 2018, section 3.4, one by one; and as scikit-learn has it."""
    (train, label), (test, _) = clusters(60, seed=1), clusters(40, seed=2)
    expected = []
    for x in test:
        cosine = unit(train) @ unit(x)
        votes = np.zeros(CLASSES)
        for i in np.argsort(-cosine)[:k]:
            votes[label[i]] += np.exp(cosine[i] / temperature)
        expected.append(votes.argmax())
    found = evaluators.nearest_neighbours(train, label, test, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, expected)
    # Of unit vectors, |a - b|^2 = 2 - 2 cosine.
    vote = lambda distance: np.exp((1 - distance**2 / 2) / temperature)  # noqa: E731
    theirs = KNeighborsClassifier(min(k, 60), weights=vote).fit(unit(train), label)
    np.testing.assert_array_equal(found, theirs.predict(unit(test)))


def test_nearest_neighbours_do_not_mind_the_length_of_features():
    (train, label), (test, _) = clusters(60, seed=1), clusters(40, seed=2)
    longer = test * np.float32(np.linspace(0.1, 9, 40))[:, None]
    found = evaluators.nearest_neighbours(train, label, longer)
    np.testing.assert_array_equal(found, evaluators.nearest_neighbours(train, label, test))
    zero = evaluators.nearest_neighbours(train, label, np.zeros_like(test))
    assert ((zero >= 0) & (zero < CLASSES)).all()


@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
def test_linear_probe_is_logistic_regression_on_standardised_features(l2):
    (train, label), (test, _) = clusters(60, seed=1), clusters(200, seed=2)
    train, test = (x * [1, 1, 1, 1, 1, 1000] + [0, 0, 0, 0, 50, 0] for x in (train, test))
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=1 / l2, max_iter=1000).fit(scaler.transform(train), label)
    found = evaluators.linear_probe(train, label, test, l2=l2)
    np.testing.assert_array_equal(found, theirs.predict(scaler.transform(test)))
    assert len(set(found)) > 2


def test_linear_probe_bears_a_feature_that_never_changes():
    (train, label), (test, _) = clusters(60, seed=1), clusters(20, seed=2)
    constant = [np.pad(x, ((0, 0), (0, 1)), constant_values=3) for x in (train, test)]
    found = evaluators.linear_probe(constant[0], label, constant[1])
    np.testing.assert_array_equal(found, evaluators.linear_probe(train, label, test))


def probe(name, train, test, **fields):
    def step(state, batch):
        return batch["image"], batch["label"], batch["weight"]

    evaluate = evaluators.Probe(name, step, CLASSES, **fields)
    loaders = {"train": Loader(*train), "test": Loader(*test)}
    return evaluate(None, loaders.get, "test")


@pytest.mark.parametrize("name", evaluators.PROBES)
def test_probe_learns_from_train_and_is_judged_on_the_split(name):
    train, test = clusters(61, seed=1), clusters(37, seed=2)
    predict = {"knn": evaluators.nearest_neighbours, "linear": evaluators.linear_probe}[name]
    expected = (predict(*train, test[0]) == test[1]).mean()
    assert probe(name, train, test) == {f"{name}_accuracy": pytest.approx(expected, abs=1e-9)}


@pytest.mark.parametrize("shots", [1, 5, 1000])
def test_shots_are_the_first_examples_of_each_class(shots):
    (x, label), test = clusters(61, seed=1), clusters(37, seed=2)
    kept = [i for i in range(61) if (label[:i] == label[i]).sum() < shots]
    assert len(kept) == min(4 * shots, 61)
    few = evaluators.nearest_neighbours(x[kept], label[kept], test[0])
    expected = (few == test[1]).mean()
    found = probe("knn", (x, label), test, shots=shots)
    assert found == {"knn_accuracy": pytest.approx(expected, abs=1e-9)}


def test_shots_stop_reading_once_they_are_all_there():
    (x, label), test = clusters(400, seed=1), clusters(37, seed=2)
    read = []

    class Counted(Loader):
        def batches(self, start, stop):
            for batch in super().batches(start, stop):
                read.append(len(batch["label"]))
                yield batch

    evaluate = evaluators.Probe("knn", lambda _, b: (b["image"], b["label"], b["weight"]), 4, 2)
    found = evaluate(None, {"train": Counted(x, label), "test": Loader(*test)}.get, "test")
    assert found == probe("knn", (x, label), test, shots=2)
    assert sum(read) < 100


def test_transfer_is_measured_on_its_own_loaders_with_the_test_split():
    one, other = clusters(61, seed=1), clusters(37, seed=2)
    inner = evaluators.Probe("knn", lambda _, b: (b["image"], b["label"], b["weight"]), CLASSES)
    theirs = {"train": Loader(*one), "test": Loader(*other)}
    transfer = evaluators.Transfer(inner, theirs.get)
    ours = {}  # not asked
    assert transfer(None, ours.get, "valid") == transfer(None, ours.get, "train") == {}
    expected = inner(None, theirs.get, "test")["knn_accuracy"]
    assert transfer(None, ours.get, "test") == {"transfer_knn_accuracy": expected}


# --- end to end -----------------------------------------------------------------------------------


def transfer_to(source, *more):
    return [f"eval.transfer_source={source}", "eval.probes=('knn', 'linear')", *more]


def test_transfer_to_the_own_set_measures_what_the_own_probes_do(load):
    plain = build(load("digits_mlp:smoke", "eval.probes=('knn', 'linear')"))
    other = build(load("digits_mlp:smoke", *transfer_to("digits", "eval.probe_shots=0")))
    state = plain.init()
    own, found = (loop.evaluate(e, state, "test", final=True) for e in (plain, other))
    for name in ("knn_accuracy", "linear_accuracy"):
        assert found[f"transfer_{name}"] == own[name]
        assert name not in found
    assert not any("transfer" in n for n in loop.evaluate(other, state, "valid", final=True))


PAIRS = ("eval.transfer_train_split=pairs", "eval.transfer_test_split=pairs")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["eval.transfer_source=digits"], ["measures nothing", "eval.probes"]),
        (transfer_to("wine"), ["wine", "image (8, 8, 1)", "features (13,)"]),
        (transfer_to("modular:7:add", *PAIRS), ["modular", "label"]),
        (transfer_to("digits", "eval.transfer_test_split=nine"), ["nine", "train, valid, test"]),
        (transfer_to("digits", "eval.transfer_transforms=('crop',)"), ["crop"]),
        (transfer_to("nothing"), ["nothing", "unknown"]),
    ],
)
def test_a_transfer_that_cannot_be_measured_is_refused(load, fields, words):
    with pytest.raises(UserError) as error:
        build(load("digits_mlp:smoke", *fields))
    assert all(word in str(error.value) for word in words), error.value


def test_probes_of_the_digits_are_measured_at_the_end(train, tmp_path):
    code, out, _ = train(
        "digits_mlp:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.eval.probes=('knn', 'linear')",
        "--config.log.tensorboard=false",
        "--config.eval.every_steps=10",
    )
    assert code == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    names = {"knn_accuracy", "linear_accuracy"}
    for row in rows:
        final = row["step"] == 20 and row["split"] != "train"
        assert (names & row.keys()) == (names if final else set())
        if final:
            # Of a network that 20 steps have hardly changed, but which is wide.
            assert all(0.9 < row[name] <= 1 for name in names)
    assert "knn_accuracy" in out
    assert "linear_accuracy" in out


def test_a_finished_run_is_judged_on_another_set(train, tmp_path):
    run = (f"--workdir={tmp_path / 'run'}", "--config.log.tensorboard=false")
    assert train("digits_mlp:smoke", *run)[0] == 0
    asked = [f"--config.{field}" for field in transfer_to("digits", "eval.probe_shots=5")]
    code, out, _ = train("digits_mlp:smoke", *run, "--eval-only", *asked)
    assert code == 0
    heads, *rows = out.splitlines()
    assert heads.split()[-2:] == ["transfer_knn_accuracy", "transfer_linear_accuracy"]
    numbers = {row.split()[0]: len(re.findall(r"\d+\.\d+", row)) for row in rows[:4]}
    assert numbers == {"train": 2, "valid": 2, "test": 4, "gap": 2}


def test_zero_shot_accuracy_of_the_digits_is_in_every_evaluation(load):
    tiny = [f"model.{t}_{f}" for t in ("vision", "text") for f in ("width=8", "num_layers=1")]
    experiment = build(load("digits_clip:smoke", *tiny), devices=jax.devices()[:1])
    state = drawn_state(experiment)
    measured = loop.evaluate(experiment, state, "valid")
    loader = experiment.eval_loader("valid")
    rows = [loader.rows(i, np.arange(96)) for i in range(loader.num_batches)]
    batch = {n: np.concatenate([r[n][r["weight"] > 0] for r in rows]) for n in rows[0]}
    encode = jit(experiment.module.apply, static_argnames=("train", "method"))
    variables = {"params": state.params}
    image, _ = experiment.task.inputs(batch)
    image = encode(variables, image, train=False, method="encode_image")
    captions = [f"a handwritten {name}".encode() for name in DIGIT_NAMES]
    tokens = np.array([[*text, 256] + [0] * (31 - len(text)) for text in captions])
    text = encode(variables, tokens, train=False, method="encode_text")
    nearest = np.argmax(np.array(image @ text.T), axis=1)
    accuracy = (nearest == batch["label"]).mean()
    assert measured["zero_shot_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert measured["examples"] == 270
    assert 0 < measured["accuracy"] < 1


CLIP = [f"model.{t}_{f}" for t in ("vision", "text") for f in ("width=8", "num_layers=1")]


def test_zero_shot_transfer_is_by_the_other_sets_names(load, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(DIGIT_NAMES))
    reversed_ = tmp_path / "reversed.txt"
    reversed_.write_text("\n".join(reversed(DIGIT_NAMES)))
    measured = []
    for file in ("", names, reversed_):
        more = [f"eval.transfer_class_names={file}"]
        experiment = build(load("digits_clip:smoke", *CLIP, *transfer_to("digits"), *more))
        measured.append(loop.evaluate(experiment, drawn_state(experiment), "test", final=True))
    by_card, by_file, by_wrong = measured
    assert by_card["transfer_zero_shot_accuracy"] == by_card["zero_shot_accuracy"]
    assert by_file == by_card
    assert by_wrong["transfer_zero_shot_accuracy"] != by_card["zero_shot_accuracy"]
    own = build(load("digits_clip:smoke", *CLIP, "eval.probes=('knn', 'linear')"))
    found = loop.evaluate(own, drawn_state(own), "test", final=True)
    for name in ("knn_accuracy", "linear_accuracy"):  # of images as CLIP embeds them
        assert by_card[f"transfer_{name}"] == found[name] > 0.2


def test_as_many_names_as_classes_are_needed(load, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo")
    for file, words in [(names, "10 classes and 2 names"), (tmp_path / "no", "is no file")]:
        fields = transfer_to("digits", f"eval.transfer_class_names={file}")
        with pytest.raises(UserError, match=words):
            build(load("digits_clip:smoke", *CLIP, *fields))
