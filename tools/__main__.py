"""The `ibq` command as one of many processes: torchrun --nproc-per-node 8 -m tools tokenize RUN ..."""

from tools.cli import main

if __name__ == "__main__":
    main()
