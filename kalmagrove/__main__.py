"""`python -m kalmagrove VERB ...`: the form that launchers start on each rank."""

from kalmagrove.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
