"""The embedded data set: real handwritten digits as a TFDS builder, prepared without network.

Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", test part, as
scikit-learn carries it: 1,797 images of 8x8 pixels with values 0 to 16.
"""

import numpy as np
import tensorflow_datasets as tfds

SPLITS = {"train": 1257, "valid": 270, "test": 270}


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits in fixed, stratified and disjoint train, valid and test splits."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS reads a class attribute)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 pixels with values 0 to 16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "id": np.int64,  # the image's place in scikit-learn's order
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i in np.sort(split_ids(digits.target)[split]):
            yield (
                f"{i:04d}",
                {
                    "image": digits.images[i].astype(np.uint8)[..., None],
                    "label": int(digits.target[i]),
                    "id": int(i),
                },
            )


def split_ids(labels: np.ndarray, *, sizes: dict[str, int] = SPLITS) -> dict[str, np.ndarray]:
    """{split: ids}, each class in the same proportion, the same on every machine.

    Every class's images are put in a fixed random order; image j of n then has the quantile
    (j + 1/2) / n, and the splits are cut from the order by quantile (ties broken by id).
    """
    order = np.random.RandomState(0)  # its streams are frozen for good, unlike Generator's
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        ids = order.permutation(np.flatnonzero(labels == label))
        quantile[ids] = (np.arange(len(ids)) + 0.5) / len(ids)
    ranked = np.argsort(quantile, kind="stable")
    cuts = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(ranked, cuts[:-1]), strict=True))
