"""One of several processes: training steps, checkpoints, and what became of the adapter; run by tests of two."""

import sys
from pathlib import Path

import torch

import test_trainer
import tiny
from alignprop import distributed
from alignprop.checkpointing import Checkpoints, load_checkpoint
from alignprop.estimators import DDPO, RWR, AlignProp, DraftLV, DRTune, LeapAlign
from alignprop.evaluation import Evaluation
from alignprop.regularisation import Regularisation
from alignprop.rewards import WeightedSum
from alignprop.runfolder import RunFolder
from alignprop.surgery import RULES
from alignprop.tracking import MetricsFile
from alignprop.truncation import All, Gaussian, Last, Uniform

ESTIMATORS = {
    "all": lambda: AlignProp(All()),
    "last": lambda: AlignProp(Last(2)),
    "uniform": lambda: AlignProp(Uniform()),
    "gaussian": lambda: AlignProp(Gaussian(2, 1)),
    "draft-lv": DraftLV,
    "drtune": lambda: DRTune(steps=3, early_stop=2),
    "leapalign": LeapAlign,
    "ddpo": lambda: DDPO(min_count=2, inner_epochs=2),
    "rwr": lambda: RWR(min_count=2),
}
RESUMED = ("uniform", "ddpo", "rwr")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def make(dtype, estimator, batch_size, **changes):
    return test_trainer.trainer(
        dtype=DTYPES[dtype],
        dropout=0.0,
        call={**tiny.CALL, "guidance_scale": 1.0},  # guidance multiplies the rounding of fp32 kernels by itself
        batch_size=batch_size,
        estimator=ESTIMATORS[estimator](),
        **changes,
    )


def gradient(run):
    """The gradient of the first step, after the all-reduce."""
    next(run._updates(run.descent()))
    distributed.sum_gradients(list(run.parameters.values()))
    return torch.cat([value.grad.flatten() for value in run.parameters.values()]).detach()


def main(folder):
    rank = distributed.process().process_index
    for dtype in DTYPES:
        for estimator in ESTIMATORS:
            torch.save(gradient(make(dtype, estimator, 1)), folder / f"{dtype}-{estimator}-{rank}.pt")
    for estimator in RESUMED:
        place = RunFolder(folder / estimator)
        run = make("fp32", estimator, 1, steps=3, callbacks=[Checkpoints(place, every=1)])
        run.train()
        torch.save(test_trainer.weights(run), folder / f"{estimator}-weights-{rank}.pt")
        again = make("fp32", estimator, 1, steps=3)
        load_checkpoint(again, place.checkpoints / "step-000002")
        again.train()
        torch.save(test_trainer.weights(again), folder / f"{estimator}-resumed-{rank}.pt")
    evaluations(folder / "evaluated", rank)
    drift_is_noticed(run, rank)
    failure_reaches_everyone(rank)


def evaluations(folder, rank=0, num_processes=2):
    """A run with evaluations, whose prompts do not share out evenly; and one whose judge fails on one process."""
    place = RunFolder(folder)

    def make_run(judge, path):
        judges = {"judge": judge}
        evaluation = Evaluation(RunFolder(path), {"unseen": ("a bee",)}, judges, every=1, images_per_prompt=3)
        callbacks = [evaluation, MetricsFile(RunFolder(path))]
        penalty = Regularisation(kl=0.1)
        batch = 2 // num_processes
        return make("fp64", "all", batch, steps=2, callbacks=callbacks, regularisation=penalty)

    def failing(images, prompts):
        if rank == 1:
            raise ValueError("no")
        return images.mean((1, 2, 3))

    make_run(lambda images, prompts: images.mean((1, 2, 3)), folder).train()
    if num_processes > 1:
        try:
            make_run(failing, folder / "failing").train()
        except ValueError as error:
            assert "no" in str(error), error
        else:
            raise AssertionError("rank 1 failed alone")
    return place


def with_surgery(combination, batch_size, **changes):
    """A trainer whose rewards conflict, and not alike on both halves of its pictures."""
    rewards = {
        "red": test_trainer.redness,
        "green": lambda i, p: i[:, 1].mean((1, 2)),
        "even": lambda i, p: i.std((1, 2, 3)),
    }
    objective = WeightedSum(rewards, {"red": 1.0, "green": 1.0, "even": -3.0})
    return make("fp64", "last", batch_size, reward=objective, combination=combination, **changes)


def surgery(folder):
    """The gradient of a first step, and the weights after two steps with a penalty."""
    rank = distributed.process().process_index
    for combination in RULES:
        run = with_surgery(combination, 1)
        descend, values = run.descent(), list(run.parameters.values())
        next(run._updates(descend))
        facts = descend.complete(values, torch.Generator().manual_seed(0))
        found = {"gradient": torch.cat([value.grad.flatten() for value in values]).detach(), "facts": facts}
        trained = with_surgery(combination, 1, regularisation=Regularisation(l2=1.0))
        trained.train_step(), trained.train_step()
        torch.save({**found, "weights": test_trainer.weights(trained)}, folder / f"{combination}-{rank}.pt")


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
    {"surgery": surgery}.get(sys.argv[-1], main)(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
