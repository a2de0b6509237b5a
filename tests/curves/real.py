"""The published curves of the multi-power law, with the schedules that their names stand for."""

import numpy as np

from ergodax.laws import loss_curve


PEAK, END, WARMUP = 3e-4, 3e-5, 2160
TRAIN = ("cosine_24000", "constant_24000", "wsdcon_9")
TEST = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")


def rates(name):
    kind, *numbers = name.split("_")
    total = 16001 if kind == "wsdcon" else int(numbers[-1])
    k = np.arange(total)
    fallen = np.clip((k - 20000) / 4000, 0, 1)
    every = {
        "constant": lambda: np.full(total, PEAK),
        "cosine": lambda: END + (PEAK - END) * (1 + np.cos(np.pi * (k - WARMUP) / (total - WARMUP))) / 2,
        "wsd": lambda: PEAK * (END / PEAK) ** fallen,
        "wsdld": lambda: PEAK - (PEAK - END) * fallen,
        "wsdcon": lambda: np.where(k < 8000, PEAK, int(numbers[0]) * 1e-5),
    }[kind]()
    every[:WARMUP] = np.linspace(0, PEAK, WARMUP)
    return every


def load(folder, size, name, *, warmup, block=16):
    table = np.genfromtxt(folder / f"{size}M_{name}.csv", delimiter=",", names=True)
    steps, every = table["step"].astype(int), rates(name)
    np.testing.assert_allclose(every[steps], table["lr"], rtol=1e-9)
    return loss_curve(steps, table["loss"], every, warmup=warmup, block=block)


def mean_scores(law, curves):
    """R² and MAE, means over curves."""
    errors = [np.asarray(law([curve.history]) - curve.losses) for curve in curves]
    r2 = [1 - np.sum(e**2) / (curve.losses.size * np.var(curve.losses)) for e, curve in zip(errors, curves)]
    return np.mean(r2), np.mean([np.mean(np.abs(e)) for e in errors])
