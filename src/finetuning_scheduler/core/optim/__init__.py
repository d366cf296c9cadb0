"""Parameter groups, optimizers and LR schedulers."""
