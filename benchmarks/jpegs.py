"""512 JPEGs of 500 x 375 pixels as the data set `tfds:smooth_jpegs`, in lsdl's data folder.

They stand in for ImageNet's where a decoder is to be timed: random fields of seven scales, the
large ones strong and the small ones weak as in photographs, written with quality 90.
"""

import contextlib
import io
import logging
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lsdl.data.folder import data_dir, locked

PICTURES = 512
WIDTH, HEIGHT = 500, 375
CLASSES = 10


class SmoothJpegs(tfds.core.GeneratorBasedBuilder):
    """Labelled pictures, the same on every machine."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        draw = np.random.RandomState(0)
        for i in range(PICTURES):
            file = io.BytesIO()
            Image.fromarray(picture(draw)).save(file, "JPEG", quality=90)
            file.seek(0)
            yield i, {"image": file, "label": i % CLASSES}


def picture(draw: np.random.RandomState) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8."""
    pixels_HWC = np.full((HEIGHT, WIDTH, 3), 128.0)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        coarse = draw.randint(256, size=(cells, cells, 3)).astype(np.uint8)
        field = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(field) - 127.5) * cells**-0.5
    return pixels_HWC.clip(0, 255).astype(np.uint8)


def prepare() -> str:
    """Write the set unless it is there; returns its name as a config's data.source."""
    with locked(data_dir()):
        builder = SmoothJpegs(data_dir=data_dir(), file_format="array_record")
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            logging.getLogger("absl").setLevel(logging.ERROR)
            without = tfds.download.DownloadConfig(compute_stats="skip")
            with contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare(download_config=without)
    return f"tfds:{builder.name}"
