"""``python -m medseg_ssl VERB …``: the same as ``medseg-ssl VERB …``, where scripts are not on the path."""

import sys

from medseg_ssl.cli import main

sys.exit(main())
