"""Multi-phase forms of PyTorch Lightning's ``EarlyStopping`` and ``ModelCheckpoint``, and what surrounds them."""
