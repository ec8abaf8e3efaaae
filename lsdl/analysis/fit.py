"""Under- or overfitting, from the curves of the training and the validation loss.

    under   the training loss stays large: with a flat end the optimisation or the model is at its
            limit, with a falling one the training is too short
    over    the validation loss stands well above the training loss, or has turned up again
    ok      neither

What is large is told against the loss before training, that of a model which knows nothing.

Shape letters: T rows of a curve.
"""

from typing import NamedTuple

import numpy as np

LARGE = 0.3  # of the first loss: a training loss from here on is large
GAP = 0.1  # of the first loss: validation above training
RISEN = 0.05  # of the first loss: validation above its lowest
FLAT = 0.02  # of what has been learnt: a quarter that gains less on the one before has stagnated
ADVICE = {
    "under, stagnated": "better optimisation first (rate, schedule, normalisation, "
    "initialisation), then more capacity",
    "under, falling": "train longer, or with a larger rate",
    "over": "regularise first (augmentation, weight decay, dropout, more data), then a smaller "
    "model; the lowest validation loss is where to stop",
    "ok": "nothing",
}


class Fit(NamedTuple):
    """How a run fits its data. Losses are means over the last tenth of a curve's rows."""

    verdict: str  # under | over | ok
    advice: str
    first: float  # the loss before training
    train: float
    valid: float
    gap: float  # valid - train
    risen: float  # valid over its lowest
    stagnated: bool  # the last quarter of the training loss is flat
    best_step: int  # of the lowest validation loss
    closest_step: int  # of the smallest gap: not always the better model


def diagnose(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    *,
    target: float | None = None,
    of_state: float | None = None,
) -> Fit:
    """The fit of curves `(steps, losses)`; both have a row or more, without NaN.

    A training loss above `target` is large (default: LARGE of the first one). `of_state`: the
    training loss of the last state, evaluated as validation is, for the gap.
    """
    (step_T, train_T), (at_T, valid_T) = (map(np.asarray, curve) for curve in (train, valid))
    first, last, end = float(train_T[0]), _end(train_T), float(valid_T[-1])
    alike = last if of_state is None else of_state
    learnt = max(first - last, FLAT * abs(first))
    quarter = len(train_T) // 4
    halves = train_T[-2 * quarter :].reshape(2, quarter).mean(1) if quarter else (np.inf, 0)
    stagnated = bool(halves[0] - halves[1] < FLAT * learnt)
    gap, risen = end - alike, end - float(valid_T.min())
    near_T = np.interp(at_T, step_T, _smooth(train_T))
    scale = abs(first)
    if last > (LARGE * scale if target is None else target):
        verdict, why = "under", f"under, {'stagnated' if stagnated else 'falling'}"
    elif gap > GAP * scale or risen > RISEN * scale:
        verdict = why = "over"
    else:
        verdict = why = "ok"
    return Fit(
        verdict,
        ADVICE[why],
        first=first,
        train=last,
        valid=end,
        gap=gap,
        risen=risen,
        stagnated=stagnated,
        best_step=int(at_T[valid_T.argmin()]),
        closest_step=int(at_T[np.abs(valid_T - near_T).argmin()]),
    )


def _end(loss_T: np.ndarray) -> float:
    return float(loss_T[-max(1, len(loss_T) // 10) :].mean())


def _smooth(loss_T: np.ndarray) -> np.ndarray:
    """Each row's mean with the rows before it, a tenth of all."""
    width = max(1, len(loss_T) // 10)
    total_T = np.cumsum(np.concatenate([np.full(width, loss_T[0]), loss_T]))
    return (total_T[width:] - total_T[:-width]) / width
