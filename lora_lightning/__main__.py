"""`python -m lora_lightning`."""

import sys

from lora_lightning.cli import main

sys.exit(main())
