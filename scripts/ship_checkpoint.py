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

run, target = Path(sys.argv[1]), Path(__file__).resolve().parent.parent/'transformer_experiments/artifacts/shakespeare.safetensors'
saved, timing = load_model(run/'model.safetensors'), json.loads((run/'timing.json').read_text())
machine = f"{timing['processes'] * timing['threads']} threads of a {platform.machine()} CPU"
facts = saved.facts | dict(seconds=timing['seconds'], torch=timing['torch'], machine=machine)
save_model(target, saved.build(), saved.tokenizer(), saved.data_sha256, getattr(torch, facts['recipe']['save_dtype']), **facts)
size = os.path.getsize(target)
print(f"{target}: {size:,} bytes, validation loss {list(saved.facts['evals'].values())[-1]:.4f}, {timing['seconds'] / 60:.0f} minutes on {machine}")
if size > LIMIT: sys.exit(f'{size:,} bytes are more than the {LIMIT:,} that a checkpoint may have')
