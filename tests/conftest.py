"""What every test shares."""

import os


# The Hugging Face libraries read these once, when they are imported: set them before anything else.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, so each of them gets one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
