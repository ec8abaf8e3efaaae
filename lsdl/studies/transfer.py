"""PH-30: features that were learnt for other labels, and a probe on few labels of a new one.

Teacher: 64 normal inputs, of which labels see 4 directions alone; 32 heads are known on 8,000
points, a new one on 8 to 128. Digits: a net learns 0 to 6, a probe tells 7, 8 and 9 apart.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Features learnt on many labels of related tasks make a few labels of a new one enough; "
    "nothing is gained where the tasks share no more than the raw inputs show."
)
SOURCE = (
    "Lectures: foundation models, pre-training against overfitting; Kornblith et al. 2019, Do "
    "better ImageNet models transfer better? (arXiv:1805.08974)"
)
_LECTURE = "lectures: pre-train large and generic, transfer to small and specific"
_NEGATIVE = "a negative result of the pilot: -0.7 to 1.0 points"
EXPECTED = {
    "teacher_16": Expected(
        "points that a logistic probe gains from pre-trained features over raw inputs at 16 "
        "labels, new head of a teacher that sees 4 of 64 dimensions",
        _LECTURE,
        low=15,
    ),
    "teacher_32": Expected("points gained at 32 labels", _LECTURE, low=15),
    "few_as_many": Expected(
        "points that 16 labels on pre-trained features are ahead of 128 on raw inputs",
        _LECTURE,
        low=0,
    ),
    "digits_16": Expected(
        "points gained at 16 labels on digits, where 7 classes are known and 3 are new",
        _NEGATIVE,
        low=-3,
        high=2,
    ),
    "digits_32": Expected("points gained at 32 labels on digits", _NEGATIVE, low=-3, high=2),
}
