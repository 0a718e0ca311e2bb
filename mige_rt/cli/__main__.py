"""`python -m mige_rt.cli`, the same as the command `mige-rt`."""

from mige_rt.cli import main

if __name__ == "__main__":
    main()
