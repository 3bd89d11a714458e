"""A plain training script as torchrun restarts it: the tiny GPT of the tests, saved with torch.save every ten steps."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.runs import tiny_config
from trainer.contract.config import RunConfig
from trainer.model import GPT
from trainer.optim import build_optimizer

_SAVE_EVERY = 10


def main() -> None:
    """Train until killed, and go on from the newest file."""
    corpus, root = Path(sys.argv[1]), Path(sys.argv[2])
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (root / f"pid-{start}").write_text(str(os.getpid()))
    config = RunConfig.model_validate(tiny_config(corpus))
    tokens = np.concatenate([np.fromfile(path, np.uint16)[512:] for path in sorted(corpus.glob("*.bin"))])
    model = GPT(config.model, 64, config.batch.sequence_tokens)
    optimizer = build_optimizer(model, config.optimizer)
    state, step = root / "state.pt", 0
    if state.exists():
        loaded = torch.load(state, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        step = loaded["step"]
    length, told = config.batch.sequence_tokens + 1, False
    while True:
        begin = step * config.batch.sequences * length % (len(tokens) - config.batch.sequences * length)
        flat = torch.from_numpy(tokens[begin : begin + config.batch.sequences * length].astype(np.int64))
        batch = flat.view(config.batch.sequences, length)
        model(batch[:, :-1], batch[:, 1:]).losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if not told:
            told = True
            (root / f"first-{start}").write_text(str(time.time()))
        if step % _SAVE_EVERY == 0:
            fresh = state.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, fresh)
            fresh.rename(state)


if __name__ == "__main__":
    main()
