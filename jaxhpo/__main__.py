"""`python -m jaxhpo`: the command line."""

from jaxhpo._cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
