"""What a run has gone through, phase by phase and epoch by epoch, as a file that programs read."""
