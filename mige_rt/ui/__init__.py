"""The page in the browser (extra ui): Gradio in front of the server's image service.

Gradio reads its settings from the environment, some of them when it is imported.
"""

import os
from tempfile import TemporaryDirectory

# Uploads and results; nobody else on this machine can read them, and they end with the process.
FILES = TemporaryDirectory(prefix="mige-rt-ui-")

os.environ["GRADIO_TEMP_DIR"] = FILES.name
