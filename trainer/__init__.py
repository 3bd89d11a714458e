"""The child: a bf16 GPT training loop with its data and checkpoints."""
