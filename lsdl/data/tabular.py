"""Small tables of measurements that come with scikit-learn.

Sources: Forina et al. 1991 (wine: 178 wines, 13 measurements, 3 cultivars); Street et al. 1993
(breast_cancer: 569 tumours, 30 measurements, malignant or benign); Fisher 1936 (iris: 150 flowers,
4 measurements, 3 species).
"""

import numpy as np

from lsdl.data.digits import split_ids
from lsdl.data.readers import Table

SIZES = {
    "wine": {"train": 124, "valid": 27, "test": 27},
    "breast_cancer": {"train": 399, "valid": 85, "test": 85},
    "iris": {"train": 104, "valid": 23, "test": 23},
}


def table(name: str) -> Table:
    """`wine`, `breast_cancer` or `iris`, in fixed, stratified and disjoint splits."""
    import sklearn.datasets

    data = getattr(sklearn.datasets, f"load_{name}")()
    splits = {
        split: {
            "features": data.data[np.sort(ids)].astype(np.float32),
            "label": data.target[np.sort(ids)].astype(np.int32),
        }
        for split, ids in split_ids(data.target, sizes=SIZES[name]).items()
    }
    return Table(splits, class_names=tuple(map(str, data.target_names)))
