"""What is not a sum over one batch: zero-shot classification, k-NN and linear probes.

An evaluator is `(state, loaders, split) -> {metric: value}`, `loaders(split)` being an evaluation
loader. The functions of the state run on the mesh; the probes' features are compared on the host.
`encode(variables, batch) -> (B, D)` is what a model makes of images: its features.
Shape letters: B batch, C classes, P prompts of a class, T tokens, D features, E shared embedding,
N training examples, M examples to be judged, k neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lsdl.metrics import fetched
from lsdl.state import TrainState

Loaders = Callable[[str], object]
PROBES = ("knn", "linear")


def make_class_features(apply: Callable, variables_of: Callable, token_CPT: np.ndarray):
    """`class_features(state) -> (C, E)`: the mean of the prompts' embeddings, of unit length.

    Source: Radford et al. 2021, section 3.1.4.
    """
    num_classes, prompts, length = token_CPT.shape

    def class_features(state: TrainState) -> jax.Array:
        tokens = jnp.asarray(token_CPT.reshape(-1, length))
        text_BE = apply(variables_of(state), tokens, train=False, method="encode_text")
        mean_CE = text_BE.reshape(num_classes, prompts, -1).mean(1)
        return mean_CE / jnp.linalg.norm(mean_CE, axis=-1, keepdims=True)

    return class_features


def make_zero_shot_step(encode: Callable, variables_of: Callable):
    """`zero_shot(state, class_features, batch) -> (correct, weight)`, summed over the batch."""

    def zero_shot(state: TrainState, class_CE: jax.Array, batch):
        image_BE = encode(variables_of(state), batch)
        correct_B = (image_BE @ class_CE.T).argmax(1) == batch["label"]
        return (correct_B * batch["weight"]).sum(), batch["weight"].sum()

    return zero_shot


@dataclass(frozen=True)
class ZeroShot:
    """Classification by the class whose name's embedding is the nearest to the image's."""

    class_features: Callable
    step: Callable
    every_time = True  # at each evaluation

    def __call__(self, state: TrainState, loaders: Loaders, split: str) -> dict[str, float]:
        class_CE = self.class_features(state)
        loader = loaders(split)
        batches = loader.batches(0, loader.num_batches)
        parts = fetched(self.step(state, class_CE, batch) for batch in batches)
        correct, weight = np.sum(list(parts), axis=0, dtype=np.float64)
        return {"zero_shot_accuracy": float(correct / weight)}


def make_feature_step(encode: Callable, variables_of: Callable):
    """`features(state, batch) -> (features (B, D), label (B,), weight (B,))`."""

    def features(state: TrainState, batch):
        return encode(variables_of(state), batch), batch["label"], batch["weight"]

    return features


@dataclass(frozen=True)
class Probe:
    """Accuracy of a classifier on frozen features: how well they transfer.

    It learns from the training split, or from the first `shots` examples of each class of it.
    """

    name: str  # knn | linear
    features: Callable
    num_classes: int
    shots: int = 0
    every_time = False  # after training

    def __call__(self, state: TrainState, loaders: Loaders, split: str) -> dict[str, float]:
        train_ND, train_N = self._collect(state, loaders("train"), shots=self.shots)
        if self.shots:
            first = [np.flatnonzero(train_N == c)[: self.shots] for c in range(self.num_classes)]
            train_ND, train_N = (x[np.concatenate(first)] for x in (train_ND, train_N))
        test_MD, test_M = self._collect(state, loaders(split))
        predict = {"knn": nearest_neighbours, "linear": linear_probe}[self.name]
        predicted_M = predict(train_ND, train_N, test_MD)
        return {f"{self.name}_accuracy": float((predicted_M == test_M).mean())}

    def _collect(
        self, state: TrainState, loader, *, shots: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of all examples, or of the first ones that hold all `shots`."""
        batches = loader.batches(0, loader.num_batches)
        seen = np.zeros(self.num_classes, int)
        found = []
        for x, label, weight in fetched(self.features(state, batch) for batch in batches):
            found.append((x[weight > 0], label[weight > 0]))
            seen += np.bincount(found[-1][1], minlength=self.num_classes)
            if shots and seen.min() >= shots:
                break
        x_ND, label_N = (np.concatenate(leaf) for leaf in zip(*found, strict=True))
        return x_ND, label_N


@dataclass(frozen=True)
class Transfer:
    """What `evaluator` finds on another data set, once, when training is over.

    It comes with the test split's metrics, each as `transfer_NAME`.
    """

    evaluator: Callable
    loaders: Loaders  # of the other set
    every_time = False  # after training

    def __call__(self, state: TrainState, loaders: Loaders, split: str) -> dict[str, float]:
        del loaders
        if split != "test":
            return {}
        found = self.evaluator(state, self.loaders, split)
        return {f"transfer_{name}": value for name, value in found.items()}


def nearest_neighbours(
    train_ND: np.ndarray,
    train_N: np.ndarray,
    test_MD: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Class `(M,)` by a vote of the k nearest by cosine, each of weight exp(cosine / temperature).

    Source: Wu et al. 2018, section 3.4.
    """
    train_ND, test_MD = (_unit(x) for x in (train_ND, test_MD))
    cosine_MN = test_MD @ train_ND.T
    k = min(k, len(train_N))
    nearest_Mk = np.argpartition(-cosine_MN, k - 1, axis=1)[:, :k]
    weight_Mk = np.exp(np.take_along_axis(cosine_MN, nearest_Mk, axis=1) / temperature)
    votes_MC = np.zeros((len(test_MD), train_N.max() + 1))
    np.add.at(votes_MC, (np.arange(len(test_MD))[:, None], train_N[nearest_Mk]), weight_Mk)
    return votes_MC.argmax(1)


def linear_probe(
    train_ND: np.ndarray, train_N: np.ndarray, test_MD: np.ndarray, *, l2: float = 1.0
) -> np.ndarray:
    """Class `(M,)` by logistic regression on the features, each with mean 0 and deviation 1.

    Source: Radford et al. 2021, appendix A.3 (L-BFGS), with the strength of L2 fixed.
    """
    from sklearn.linear_model import LogisticRegression  # a second of each start

    mean_D, std_D = train_ND.mean(0), train_ND.std(0) + 1e-6
    train_ND, test_MD = ((x - mean_D) / std_D for x in (train_ND, test_MD))
    fitted = LogisticRegression(C=1 / l2, max_iter=1000).fit(train_ND, train_N)
    return fitted.predict(test_MD)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
