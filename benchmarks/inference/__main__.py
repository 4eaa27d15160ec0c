import sys

from benchmarks.inference import main

if __name__ == "__main__":
    sys.exit(main())
