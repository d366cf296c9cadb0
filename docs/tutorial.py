# ---
# jupyter:
#   # A notebook begins with its title.  # ruff: noqa: D100
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Tutorial: fine-tune a small network in phases
#
# A network that has learned the digits 0 to 4 is fine-tuned on the digits 5 to 9 in three ways: without a schedule,
# with a generated one, and with one written by hand. Then the tutorial reads what the runs have left behind, and
# resumes one of them in the middle.
#
# This page is a notebook, executed on a CPU whenever it is built; its source, `docs/tutorial.py`, is a Python script.
# `jupytext --to ipynb docs/tutorial.py` makes a notebook of it for you (`jupytext` is in the extra `docs`). To run
# either you need the extra `examples`; it writes to a folder `tutorial_runs`.

# %% tags=["remove-stderr"]
import copy
import csv
import logging
import re
import shutil
import textwrap
import time
import warnings
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot as plt
from ruamel.yaml import YAML
from torch.utils.data import DataLoader, DistributedSampler

from finetuning_scheduler import FinetuningScheduler
from fts_examples.digits import NEW, OLD, DigitClassifier, Digits

MAX_EPOCHS = 300
RUNS = Path("tutorial_runs")
shutil.rmtree(RUNS, ignore_errors=True)  # what an earlier execution has left
torch.set_num_threads(1)  # so small a network is slower on more

# Lightning's notes on devices, advice that does not apply here, a deprecation in PyTorch
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*does not have many workers")
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not")
warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)

# %% [markdown]
# ## The pre-trained network
#
# `DigitClassifier` is an ordinary `LightningModule`: it returns a loss in `training_step`, logs `val_loss` in
# `validation_step`, and `configure_optimizers` returns Adam over all parameters. It knows nothing of schedules.
# `Digits` holds the 8 x 8 images that come with scikit-learn. The trainer is an ordinary one, too: it stops early,
# keeps the best checkpoint and writes the metrics to a CSV file.

# %%
L.seed_everything(0, verbose=False)
pretrained = DigitClassifier(lr=3e-3)
print(pretrained)


# %%
def new_trainer(way, *callbacks):
    """Make a trainer with these callbacks besides the usual ones."""
    early_stopping = EarlyStopping("val_loss", patience=4)
    best = ModelCheckpoint(RUNS / way / "checkpoints", monitor="val_loss")
    return L.Trainer(
        max_epochs=MAX_EPOCHS,
        callbacks=[early_stopping, best, *callbacks],
        logger=CSVLogger(RUNS, name=way),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )


old_digits = Digits(OLD, train_rows=500, validation_rows=200, seed=0)
trainer = new_trainer("pretraining")
trainer.fit(pretrained, old_digits)
[metrics] = trainer.test(ckpt_path="best", datamodule=old_digits, verbose=False)
torch.save(pretrained.features.state_dict(), RUNS / "features.pt")
print(f"{metrics['test_accuracy']:.1%} of the old digits right")

# %% [markdown]
# ## The new task
#
# There are 100 images of the new digits to learn from. Their order in an epoch depends on the epoch alone; resuming
# needs that, further below. `fine_tune` puts a new head on the pre-trained features, the same one each time, and trains
# and tests it. It also keeps what the scheduler says, through the logger `finetuning_scheduler`, in a file; otherwise
# that goes to the standard error stream.

# %%
new_digits = Digits(NEW, train_rows=100, validation_rows=200, seed=0)
images = new_digits.train_dataloader().dataset
order = DistributedSampler(images, num_replicas=1, rank=0, seed=0)
train = DataLoader(images, batch_size=32, sampler=order)
validation, test = new_digits.val_dataloader(), new_digits.test_dataloader()

outcomes, final_weights = {}, {}


def new_model():
    """Return a network with the pre-trained features and a new head."""
    L.seed_everything(0, verbose=False)
    model = DigitClassifier(lr=3e-3)
    model.features.load_state_dict(torch.load(RUNS / "features.pt", weights_only=True))
    return model


def fine_tune(way, *callbacks, ckpt_path=None):
    """Train a new model with these callbacks, then test its best checkpoint."""
    model, trainer = new_model(), new_trainer(way, *callbacks)
    start = time.perf_counter()
    with log_file(RUNS / way / "log.txt"):
        trainer.fit(model, train, validation, ckpt_path=ckpt_path)
    seconds = time.perf_counter() - start
    final_weights[way] = copy.deepcopy(model.state_dict())
    best = trainer.checkpoint_callback.best_model_path
    [metrics] = trainer.test(model, test, ckpt_path=best, verbose=False)
    outcomes[way] = metrics["test_accuracy"], trainer.current_epoch, seconds
    print(f"{metrics['test_accuracy']:.1%} of the new digits right")


@contextmanager
def log_file(path):
    """Append to a file what the scheduler says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    logging.getLogger("finetuning_scheduler").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("finetuning_scheduler").removeHandler(handler)
        handler.close()


# %% [markdown]
# ## 1. Without a schedule
#
# All parameters are trained from the first step to the last.

# %%
fine_tune("no schedule")

# %% [markdown]
# ## 2. With a generated schedule
#
# One callback more: `FinetuningScheduler`. Neither the module nor the other callbacks change. The scheduler generates a
# schedule, as it is given none. A phase ends when early stopping runs out of patience; before the next one begins, the
# best checkpoint so far is restored.
#
# A later phase that names no learning rate has `base_max_lr`. Its default, 1e-5, is meant for large pre-trained models;
# `None` means the rate that the module gives its optimizer, which suits this network better.

# %%
fine_tune("generated", FinetuningScheduler(base_max_lr=None))

# %% [markdown]
# The generated schedule lies in the trainer's log directory: two parameter tensors a phase, from the network's last to
# its first.

# %%
saved = RUNS / "generated" / "version_0" / "DigitClassifier_ft_schedule.yaml"
print(saved.read_text())

# %% [markdown]
# In the log stands when each phase gave way to the next, and why.


# %%
def show_log(way):
    """Print what the scheduler said, with long lines folded."""
    for line in (RUNS / way / "log.txt").read_text().splitlines():
        print(textwrap.fill(line, 88, subsequent_indent="    "))


show_log("generated")

# %% [markdown]
# ## 3. With a schedule of your own
#
# To start from the generated file, run once with `FinetuningScheduler(gen_ft_sched_only=True)`, which writes it without
# training. The schedule here selects parameters by regular expressions and, in its last phase, by `"*"`: all that no
# other phase selects. `max_transition_epoch` is the epoch, counted from the start of the run, at which the next phase
# begins at the latest. `lr` is the learning rate of what the phase thaws; in phase 0 that is the optimizer's.

# %%
schedule = RUNS / "schedule.yaml"
schedule.write_text("""\
0:
  params: [head.*]
  max_transition_epoch: 10
1:
  params: [features.conv3.*]
  max_transition_epoch: 25
  lr: 2.0e-03
2:
  params: ["*"]
  lr: 1.0e-03
""")

fine_tune("explicit", FinetuningScheduler(schedule))
show_log("explicit")

# %% [markdown]
# ## What came of the three

# %%
print(f"accuracy: of the best checkpoint, on {len(test.dataset)} images held out\n")
print(f"{'':12} accuracy  epochs  seconds")
for way, (accuracy, epochs, seconds) in outcomes.items():
    print(f"{way:12} {accuracy:8.1%}  {epochs:6}  {seconds:7.1f}")

# %% [markdown]
# One seed and so few images say little about accuracy. The price of a schedule shows in the epochs: the run in which
# every phase waits for early stopping has the most. An epoch costs less while most of a large model is frozen, which
# can make up for that; a network as small as this one has little to save. [Limits](limits.md) says more.
#
# ## Reading a run's history
#
# A run leaves the schedule in force, the metrics, and its checkpoints; the log is the one that `fine_tune` keeps.

# %%
for path in sorted((RUNS / "explicit").rglob("*.*")):
    print(path)

# %% [markdown]
# A checkpoint says in which phase it was written, when that phase had begun, and which parameters the optimizer held.
# Checkpoints hold tensors and plain values only, so `weights_only=True` does.

# %%
[path] = (RUNS / "explicit" / "checkpoints").glob("*.ckpt")
progress = torch.load(path, weights_only=True)["callbacks"]["FinetuningScheduler"]
print(path.name)
for key in ("phase", "entry_epoch", "entry_step"):
    print(f"{key}: {progress[key]}")
for group in progress["parameter_groups"]:
    print(", ".join(group))

# %% [markdown]
# The saved schedule has all names in full, so it tells what each phase trains. When phases began, and why, is in the
# log's lines. The last phase has no line for its end: early stopping ended it, unless the trainer's limit did.


# %%
def losses(way, version=0):
    """Return the validation loss of each epoch."""
    with (RUNS / way / f"version_{version}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return {int(row["epoch"]): float(row["val_loss"]) for row in rows}


def shares(way):
    """Return the share of all parameters that is trainable in each phase."""
    path = RUNS / way / "version_0" / "DigitClassifier_ft_schedule.yaml"
    if not path.exists():
        return [1.0]
    sizes = {name: weights.numel() for name, weights in pretrained.named_parameters()}
    names = [phase["params"] for phase in YAML(typ="safe").load(path).values()]
    thawed = accumulate(sum(sizes[name] for name in phase) for phase in names)
    return [size / sum(sizes.values()) for size in thawed]


def phases(way):
    """Return first epoch, last epoch, share and reason of the end of each phase."""
    log = (RUNS / way / "log.txt").read_text()
    ends = re.findall(r"Phase \d+ -> \d+ \((.+)\) at epoch (\d+)", log)
    epochs = outcomes[way][1]
    ends.append(("early stopping" if epochs < MAX_EPOCHS else "max_epochs", epochs))
    first, rows = 0, []
    for share, (reason, end) in zip(shares(way), ends, strict=False):
        rows.append((first, int(end) - 1, share, reason))
        first = int(end)
    return rows


print(f"{'':12} phase  epochs     trainable  ended by")
for way in outcomes:
    for phase, (first, last, share, reason) in enumerate(phases(way)):
        print(f"{way:12} {phase:5}  {f'{first} to {last}':9}  {share:9.1%}  {reason}")

# %% [markdown]
# The same as a picture: the validation loss, with a numbered band for each phase, darker the more of the model is
# trainable. The dot is the best epoch, whose checkpoint was tested.

# %%
figure, axes = plt.subplots(3, figsize=(8, 6), sharex=True, sharey=True)
figure.set_layout_engine("constrained")
axes[-1].set(xlabel="epoch")
for axis, way in zip(axes, outcomes, strict=False):
    curve = losses(way)
    best = min(curve, key=curve.get)
    for phase, (first, last, share, _) in enumerate(phases(way)):
        color = ("tab:blue", 0.1 + 0.3 * share)
        axis.axvspan(first - 0.5, last + 0.5, facecolor=color, edgecolor="white")
        axis.text(first, 0.95, phase, transform=axis.get_xaxis_transform(), va="top")
    axis.plot(list(curve), list(curve.values()), color="black")
    axis.plot(best, curve[best], "o", color="tab:red")
    axis.set(title=way, ylabel="val_loss", yscale="log", ylim=(None, 9))

# %% [markdown]
# ## Resuming in the middle
#
# The explicit schedule again, and the power fails in epoch 20, in the middle of phase 1. A second `ModelCheckpoint`,
# which monitors nothing, keeps the newest state. (Several checkpoint callbacks do not disturb each other: the one that
# monitors something drives the phases.)


# %%
class PowerCut(L.Callback):
    """Ends a run at the first batch of epoch 20."""

    def on_train_batch_start(self, trainer, *_):
        """Raise an error if it is time."""
        if trainer.current_epoch == 20:
            raise RuntimeError("no power")


newest = ModelCheckpoint(RUNS / "interrupted" / "newest")
try:
    fine_tune("interrupted", FinetuningScheduler(schedule), newest, PowerCut())
except RuntimeError as error:
    print(error)

# %% [markdown]
# Lightning resumes from a path. Phase, parameter groups, learning rates, patience and the best checkpoint so far are
# those of that moment.

# %%
newest_path = newest.best_model_path
print(Path(newest_path).name)
newest = ModelCheckpoint(RUNS / "interrupted" / "newest")
scheduler = FinetuningScheduler(schedule)
fine_tune("interrupted", scheduler, newest, ckpt_path=newest_path)
show_log("interrupted")

resumed, expected = final_weights["interrupted"], final_weights["explicit"]
weights_equal = all(torch.equal(resumed[name], expected[name]) for name in expected)
losses_equal = losses("interrupted") | losses("interrupted", 1) == losses("explicit")
print(f"weights equal: {weights_equal}, losses equal: {losses_equal}")

# %% [markdown]
# Equal means to the last bit, which also takes the same data in the same order: hence the sampler above. A
# `DataLoader(shuffle=True)` draws from the process's random numbers, and these begin anew in a new process.
#
# ## What next
#
# - [The guide](guide/schedules.md): all keys of a schedule, when phases end, learning rates, restoring and resuming.
# - [Programs around a fit](programs.md): folds, learning rate finders, averages of weights, loops of your own.
# - [Several devices](strategies/index.md).
# - [SuperGLUE](examples/superglue.md): a pre-trained language model, from configuration files.
