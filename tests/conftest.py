"""What several test files share."""
import os

if os.environ.get("PYTEST_XDIST_WORKER"): os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: the test processes share the cores

import pandas as pd
import pytest

from embodied_midtrain.core import generator


@pytest.fixture(scope="module")
def scores():
    "Scores with many ties, for two seeds."
    rng = generator(0, "scores")
    source = rng.choice(["a", "b", "c"], 500, p=[0.7, 0.25, 0.05])
    tables = [pd.DataFrame(dict(id=[f"{s}/{i}" for i, s in enumerate(source)], source=source, seed=seed, score=(rounded := rng.integers(0, 20, 500) / 20),
                                logit=rounded * 4 - 2, distance=-rng.random(500), random=rng.random(500))) for seed in (0, 1)]
    return pd.concat(tables, ignore_index=True)
