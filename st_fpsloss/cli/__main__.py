"""``python -m st_fpsloss.cli`` is ``st-fpsloss``."""

import sys

from st_fpsloss.cli.main import main

sys.exit(main())
