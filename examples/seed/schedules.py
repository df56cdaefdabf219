# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedules of damo.PyOptimizer. `python examples/seed/schedules.py`"""

import numpy as np

import damo

settings = {
    "exponential_decay": {"decay_steps": 100, "decay_rate": 0.5},
    "polynomial_decay": {"decay_steps": 100, "end_learning_rate": 0.01, "power": 1.0},
    "nature_exponential_decay": {"decay_steps": 100, "decay_rate": 0.5},
    "inverse_time_decay": {"decay_steps": 100, "decay_rate": 0.5},
    "cosine_decay": {"decay_steps": 100},
    "liner_cosine_decay": {"decay_steps": 100, "num_periods": 0.5, "alpha": 0.0, "beta": 0.001},
    "": {},  # none
}
after_100_steps = [0.5, 0.01, 0.60653, 0.66667, 0.0, 0.001, 1.0]
for (name, values), expected in zip(settings.items(), after_100_steps, strict=True):
    parameters = damo.Parameters()
    parameters.insert("name", "sgd")
    parameters.insert("gamma", 1.0)
    schedule = damo.Parameters()
    schedule.insert("name", name)
    for key, value in values.items():
        schedule.insert(key, value)
    optimizer = damo.PyOptimizer(parameters, schedule)
    rates = []
    for step in (0, 50, 100):
        weights = np.zeros(1, dtype=np.float32)
        optimizer.call(weights, np.ones(1, dtype=np.float32), step)  # sgd moves a weight by rate * gradient
        rates.append(-float(weights[0]))
    print(f"{name or '(none)':24}", *(f"{rate:.4f}" for rate in rates))
    assert abs(rates[2] - expected) < 1e-4
