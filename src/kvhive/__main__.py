"""`python -m kvhive` is `kvhive`."""

from kvhive.cli import main

if __name__ == "__main__":
    main()
