"""`python -m lora_lightning`."""

import sys

from lora_lightning.cli.start import main

sys.exit(main())
