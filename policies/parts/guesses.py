"""Which predictions a policy asks for that looks several layers ahead."""

from moesim.policies.api import Prediction


def predictions(predictor: str, ahead: int, recall: float) -> tuple[Prediction, ...]:
    """Return one for each of the next `ahead` layers, made after the gate.

    `gate` stands for gate1, gate2 and so on, one for each distance, and `residual` likewise.
    """
    numbered = predictor in ("gate", "residual")
    return tuple(
        Prediction(
            f"{predictor}{distance}" if numbered else predictor, distance=distance, recall=recall
        )
        for distance in range(1, ahead + 1)
    )
