"""`python -m nexus_cli`."""

from nexus_cli.main import main

if __name__ == "__main__":
    main()
