"""Train an MLP on MNIST with and without the energy of the training path: --method blocks|global, --mu strength."""

import sys

from groundstate.report.original import main

if __name__ == "__main__":
    sys.exit(main(__file__))
