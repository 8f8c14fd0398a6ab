"""Two processes: the same gradient as one process on the union batch, and the same adapter on both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_worker as worker
import test_trainer
from alignprop.runfolder import RunFolder

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}
# In deviations of a handful of scores, the rounding of fp32 kernels is no longer small.
BY_ADVANTAGE = {"fp32": 1e-3, "fp64": 1e-10}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(Path(__file__).parent / "distributed_worker.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("dtype", worker.DTYPES)
@pytest.mark.parametrize("estimator", worker.ESTIMATORS)
def test_the_gradient_is_that_of_one_process_on_the_union_batch(two_processes, dtype, estimator):
    alone = worker.gradient(worker.make(dtype, estimator, 2))
    first, second = (torch.load(two_processes / f"{dtype}-{estimator}-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert ((first - alone).norm() / alone.norm()).item() < (
        BY_ADVANTAGE if estimator in ("ddpo", "rwr") else TOLERANCE
    )[dtype]
    half = worker.gradient(worker.make(dtype, estimator, 1))
    assert ((half - alone).norm() / alone.norm()).item() > 1e-3  # one rank's share alone is another gradient


def test_evaluations_and_metrics_are_those_of_one_process(two_processes, tmp_path):
    alone = worker.evaluations(tmp_path, num_processes=1)
    both = RunFolder(two_processes / "evaluated")
    lines, expected = both.evaluations.read(), alone.evaluations.read()
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line, other in zip(lines, expected, strict=True):
        assert line["kept"] == other["kept"] and line["images_scored"] == other["images_scored"]
        found, wanted = (each["sets"]["unseen"] for each in (line, other))
        for name in ("redness", "judge"):
            assert found["rewards"][name] == pytest.approx(wanted["rewards"][name], rel=1e-5)
        assert found["diversity"] == pytest.approx(wanted["diversity"], rel=1e-5)
    for line, other in zip(both.metrics.read(), alone.metrics.read(), strict=True):
        assert line["kl"] == pytest.approx(other["kl"], rel=1e-6)
        assert line["live_steps"] == other["live_steps"]
    assert line["kl"] > 0


@pytest.mark.parametrize("estimator", worker.RESUMED)
def test_ranks_hold_the_same_adapter_and_resume_to_it(two_processes, estimator):
    names = [f"{estimator}-{name}-{rank}.pt" for name in ("weights", "resumed") for rank in (0, 1)]
    weights = [torch.load(two_processes / name) for name in names]
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    fresh = test_trainer.weights(worker.make("fp32", estimator, 1))
    assert any(not torch.equal(value, weights[0][name]) for name, value in fresh.items())
