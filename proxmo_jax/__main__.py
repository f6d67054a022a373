import sys

from proxmo_jax.cli import main

sys.exit(main())
