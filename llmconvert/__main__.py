"""Entry point of ``python -m llmconvert``: for torchrun, and where the script is not on the path."""

from llmconvert.cli import main

if __name__ == "__main__":
    main(prog_name="llmconvert")
