"""What a recovery starts from: the catalogue of checkpoints, targets, plans, retention."""
