"""What `torch.distributed` makes of a model: units, flat tensors, plans, replicas. Knows no trainer."""
