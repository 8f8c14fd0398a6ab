"""One of several processes: a training step, a checkpoint, and what became of the adapter; run by test_distributed."""

import sys
from pathlib import Path

import torch

import test_trainer
import tiny
from alignprop import distributed
from alignprop.checkpointing import Checkpoints, load_checkpoint
from alignprop.estimators import AlignProp
from alignprop.runfolder import RunFolder
from alignprop.truncation import All, Gaussian, Last, Uniform

TRUNCATIONS = {"all": All(), "last": Last(2), "uniform": Uniform(), "gaussian": Gaussian(2, 1)}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def make(dtype, truncation, batch_size, **changes):
    return test_trainer.trainer(
        dtype=DTYPES[dtype],
        dropout=0.0,
        call={**tiny.CALL, "guidance_scale": 1.0},  # guidance multiplies the rounding of fp32 kernels by itself
        batch_size=batch_size,
        estimator=AlignProp(TRUNCATIONS[truncation]),
        **changes,
    )


def gradient(run):
    """The gradient of the first step, after the all-reduce."""
    run._estimate_all()
    distributed.sum_gradients(list(run.parameters.values()))
    return torch.cat([value.grad.flatten() for value in run.parameters.values()]).detach()


def main(folder):
    rank = distributed.process().process_index
    for dtype in DTYPES:
        for truncation in TRUNCATIONS:
            torch.save(gradient(make(dtype, truncation, 1)), folder / f"{dtype}-{truncation}-{rank}.pt")
    run = make("fp32", "uniform", 1, steps=3, callbacks=[Checkpoints(RunFolder(folder), every=1)])
    run.train()
    torch.save(test_trainer.weights(run), folder / f"weights-{rank}.pt")
    again = make("fp32", "uniform", 1, steps=3)
    load_checkpoint(again, folder / "checkpoints" / "step-000002")
    again.train()
    torch.save(test_trainer.weights(again), folder / f"resumed-{rank}.pt")
    drift_is_noticed(run, rank)
    failure_reaches_everyone(rank)


def drift_is_noticed(run, rank):
    if rank == 1:
        next(iter(run.parameters.values())).data.add_(1e-3)
    try:
        distributed.check_identical(list(run.parameters.values()))
    except RuntimeError as error:
        assert "ranks [1] differ" in str(error)
    else:
        raise AssertionError("drift was not noticed")


def failure_reaches_everyone(rank):
    def fragile(images, prompts):
        return test_trainer.redness(images, prompts) * (torch.nan if rank == 1 else 1)

    try:
        make("fp32", "last", 1, reward=fragile).train()
    except test_trainer.TrainingStopped as error:
        assert "step 1: reward 'fragile' is not finite" in str(error)
    else:
        raise AssertionError("rank 1 failed alone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
