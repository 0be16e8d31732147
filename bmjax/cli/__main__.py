"""Runs the command line as `python -m bmjax.cli`."""

from bmjax.cli.main import main

if __name__ == "__main__":
    main()
