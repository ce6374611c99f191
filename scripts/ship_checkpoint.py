"""Make a finished training run the checkpoint that the package ships: python scripts/ship_checkpoint.py RUN_FOLDER

The weights stay as `train --preset shakespeare` wrote them; what is added is how long the run took, and on what."""
import json
import os
import platform
import sys
from pathlib import Path

import torch

from transformer_experiments.models.checkpoint import load_model, save_model

LIMIT = 8_000_000 # bytes

ARTIFACTS = Path(__file__).resolve().parent.parent/'transformer_experiments/artifacts'


def ship(run: Path) -> str | None:
    "Write the checkpoint and print what it is; what is wrong with it, if anything."
    saved, timing = load_model(run/'model.safetensors'), json.loads((run/'timing.json').read_text())
    machine = f"{timing['processes'] * timing['threads']} threads of a {platform.machine()} CPU"
    facts = saved.facts | dict(seconds=timing['seconds'], torch=timing['torch'], machine=machine)
    target, dtype = ARTIFACTS/'shakespeare.safetensors', getattr(torch, facts['recipe']['save_dtype'])
    save_model(target, saved.build(), saved.tokenizer(), saved.data_sha256, dtype, **facts)
    size, loss = os.path.getsize(target), list(saved.facts['evals'].values())[-1]
    print(f"{target}: {size:,} bytes, validation loss {loss:.4f}, {timing['seconds'] / 60:.0f} minutes on {machine}")
    return f'{size:,} bytes are more than the {LIMIT:,} that a checkpoint may have' if size > LIMIT else None


if __name__ == '__main__':
    sys.exit(ship(Path(sys.argv[1])))
