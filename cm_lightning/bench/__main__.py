"""``python -m cm_lightning.bench``."""

from cm_lightning.bench.commands import main

if __name__ == "__main__":
    main()
