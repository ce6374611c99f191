"""Make finished training runs a checkpoint that the package ships.

    python scripts/ship_checkpoint.py shakespeare RUN_FOLDER
    python scripts/ship_checkpoint.py three_texts_mixture runs/mixture-0 runs/mixture-1 runs/mixture-dense-0 ...

The first run becomes the checkpoint; its weights stay as `train` wrote them. What is added is how long the run took
and on what machine; and the validation losses of all runs, where there are several, by the name of their folders."""
import json
import os
import platform
import sys
from pathlib import Path

import torch

from transformer_experiments.models.checkpoint import load_model, save_model

LIMIT = 8_000_000 # bytes

ARTIFACTS = Path(__file__).resolve().parent.parent/'transformer_experiments/artifacts'


def last_loss(saved) -> float: return list(saved.facts['evals'].values())[-1]


def validation_losses(runs: list[Path]) -> dict[str, list[float]]: # By kind of run, in the order of the runs
    losses: dict[str, list[float]] = {}
    for run in runs:
        losses.setdefault(run.name.rsplit('-', 1)[0], []).append(last_loss(load_model(run/'model.safetensors')))
    return losses


def ship(name: str, runs: list[Path]) -> str | None:
    "Write the checkpoint and print what it is; what is wrong with it, if anything."
    run = runs[0]
    saved, timing = load_model(run/'model.safetensors'), json.loads((run/'timing.json').read_text())
    machine = f"{timing['processes'] * timing['threads']} threads of a {platform.machine()} CPU"
    facts = saved.facts | dict(seconds=timing['seconds'], torch=timing['torch'], machine=machine)
    if len(runs) > 1:
        facts['validation'] = validation_losses(runs)
    target, dtype = ARTIFACTS/f'{name}.safetensors', getattr(torch, facts['recipe']['save_dtype'])
    save_model(target, saved.build(), saved.tokenizer(), saved.data_sha256, dtype, **facts)
    size = os.path.getsize(target)
    print(f"{target}: {size:,} bytes, validation loss {last_loss(saved):.4f}, {timing['seconds'] / 60:.0f} minutes on "
          f"{machine}")
    return f'{size:,} bytes are more than the {LIMIT:,} that a checkpoint may have' if size > LIMIT else None


if __name__ == '__main__':
    sys.exit(ship(sys.argv[1], [Path(run) for run in sys.argv[2:]]))
