"""``python -m mindspeed_simpo`` is the command ``mindspeed-simpo``."""

from mindspeed_simpo.cli.main import main

if __name__ == "__main__":
    main()
