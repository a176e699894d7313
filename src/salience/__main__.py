"""`python -m salience`."""

from salience.cli import main

main()
