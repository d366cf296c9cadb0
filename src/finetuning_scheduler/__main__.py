"""``python -m finetuning_scheduler`` is the command ``fts``."""

from .cli.app import main

if __name__ == "__main__":
    main()
