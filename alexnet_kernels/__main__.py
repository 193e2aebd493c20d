"""``python -m alexnet_kernels``: the same as the command ``alexnet-kernels``."""

from .cli.main import main

if __name__ == "__main__":
    main()
