"""PH-31: images and captions that name attributes, and combinations that no caption named before.

Pictures of 12 x 12: 4 colours x 4 shapes x 2 sizes, anywhere and noisy; of the 32 combinations 24
are seen, in 25 epochs, and 8 held out. Two MLP towers, CLIP's loss.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Images and texts that are trained to find each other classify what was never seen by its name "
    "alone, and their features need few labels."
)
RADFORD = "Radford et al. 2021, Learning transferable visual models from natural language"
SOURCE = f"Lectures: CLIP, zero-shot and few-shot transfer; {RADFORD} (arXiv:2103.00020)"
_LECTURE = "lectures: zero-shot transfer without explicit labels"
EXPECTED = {
    "unseen_8": Expected(
        "% of images of 8 held-out combinations that find their own of the 8 captions (chance "
        "12.5), 24 combinations seen in training",
        _LECTURE,
        low=50,
    ),
    "unseen_32": Expected("the same among all 32 captions (chance 3.1)", _LECTURE, low=15),
    "seen_32": Expected(
        "% of new images of the 24 seen combinations, among all 32 captions", _LECTURE, low=60
    ),
    "one_shot": Expected(
        "points that the names of the 8 held-out combinations are ahead of one labelled image of "
        "each, logistic probe on the image features",
        f"{RADFORD}, figure 6: zero-shot is ahead of one-shot",
        low=0,
    ),
    "few_shot": Expected(
        "points that a probe gains from the image features over raw pixels, 4 images of each of "
        "the 8 held-out combinations",
        "lectures: few-shot transfer",
        low=5,
    ),
    "untrained": Expected(
        "% of the held-out images that find their caption before training (chance 12.5)",
        _LECTURE,
        high=25,
    ),
}
