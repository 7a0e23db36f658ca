"""``python -m fused_vae`` is ``fused-vae``."""

import sys

from .cli import main

sys.exit(main())
