"""Train an MLP on MNIST with and without a spectral energy of its weights: --method, --mu; see --help."""

import sys

from groundstate.report.original import main

if __name__ == "__main__":
    sys.exit(main(__file__))
