"""`python -m lora_lightning`."""

import sys

from lora_lightning.cli.main import main

sys.exit(main())
